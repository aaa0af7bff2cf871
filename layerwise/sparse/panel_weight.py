"""A sparse weight as the kernel reads it: cut into panels of columns, each one packed as a bitmask."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from layerwise.sparse.bitmask import BYTE_BITS, PackedWeight, pack, unpack
from layerwise.sparse.huge_pages import in_huge_pages

# The inputs of a panel stay in the first-level cache (32 kB) while its weights stream by: 24 kB in float32.
PANEL_COLUMNS = 6144
PANEL_STEP = 64  # columns; a multiple of what any level of instructions expands at a time
INT8_STEPS = 127  # of a row's scale, to either side of zero


@dataclass(frozen=True)
class PanelWeight:
    """A weight matrix as masks and values, panel by panel, and within a panel row by row.

    Attributes:
        shape: of the dense weight, ``(out_features, in_features)``.
        mask: uint8, one-dimensional: for every panel what ``PackedWeight.mask`` has for its columns.
        values: the stored weights, one-dimensional; bfloat16, float32, or int8 in steps of the row's scale.
        starts: int64, shape ``(panels * out_features + 1,)``: index of the first value of every row of every panel,
            and the number of values.
        scales: float32, shape ``(out_features,)``: what one step of an int8 value is worth; None for other dtypes.
    """

    shape: tuple[int, int]
    mask: Tensor
    values: Tensor
    starts: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        panels = panel_bounds(columns)
        mask_bytes = sum(rows * -(-(last - first) // 8) for first, last in panels)
        parts = [part for part in (self.mask, self.values, self.starts, self.scales) if part is not None]
        assert all(part.is_contiguous() for part in parts), "the kernel reads whole arrays"
        sizes = (self.mask.numel(), self.starts.numel(), self.values.numel())
        wanted = (mask_bytes, len(panels) * rows + 1, int(self.starts[-1]))
        if sizes != wanted or (self.scales is None) == (self.values.dtype == torch.int8):
            raise ValueError(
                f"a weight of shape {self.shape} with {self.values.dtype} values, "
                f"{'no' if self.scales is None else self.scales.numel()} scales and (mask bytes, starts, values) of "
                f"{sizes} was given, where {wanted} belong together. Make it with panels_of."
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.mask.nbytes + self.values.nbytes + self.starts.nbytes + scales

    def dense(self) -> Tensor:
        """The weight with its zeros, shape ``(out_features, in_features)``; float32 if its values are int8."""
        rows, columns = self.shape
        values = self.values if self.scales is None else self.values.float()
        parts, byte = [], 0
        for index, (first, last) in enumerate(panel_bounds(columns)):
            start, end = (int(self.starts[rows * panel]) for panel in (index, index + 1))
            mask_bytes = rows * -(-(last - first) // 8)
            mask = self.mask[byte : byte + mask_bytes].view(rows, -1)
            parts.append(unpack(PackedWeight((rows, last - first), mask, values[start:end])))
            byte += mask_bytes
        dense = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return dense if self.scales is None else dense * self.scales[:, None]


def panel_width(columns: int) -> int:
    """Columns of every panel but the last: as equal as steps allow, and at most ``PANEL_COLUMNS``."""
    panels = max(1, -(-columns // PANEL_COLUMNS))
    return -(-columns // (panels * PANEL_STEP)) * PANEL_STEP


def panel_bounds(columns: int) -> list[tuple[int, int]]:
    """First column of every panel and the one after its last."""
    width = panel_width(columns)
    return [*pairwise([*range(0, columns, width), columns])]


def panels_of(packed: PackedWeight, int8: bool = False) -> PanelWeight:
    """The same weight in panels.

    Mask and values are copies, in huge pages; a weight of more than one panel is unpacked on the way.

    Args:
        packed: its values in bfloat16 or float32.
        int8: round the values to 127 steps either side of zero of a scale per row, its largest value / 127.

    Raises:
        TypeError: values of another dtype.
        ValueError: no rows or no columns; with ``int8``, values that are not finite.
        OSError: no memory.
    """
    if packed.values.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(
            f"the sparse kernel multiplies bfloat16 and float32 weights, not {packed.values.dtype}. Convert the weight."
        )
    if 0 in packed.shape:
        raise ValueError(f"a weight of shape {packed.shape} has nothing to multiply. Keep it dense.")
    rows, columns = packed.shape
    bounds = panel_bounds(columns)
    dense = unpack(packed) if len(bounds) > 1 else None
    panels = [packed] if dense is None else [pack(dense[:, first:last]) for first, last in bounds]
    counts = torch.cat([BYTE_BITS[panel.mask.int()].sum(dim=1) for panel in panels])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    mask = in_huge_pages(torch.cat([panel.mask.flatten() for panel in panels]))
    values = torch.cat([panel.values for panel in panels])
    if not int8:
        return PanelWeight(packed.shape, mask, in_huge_pages(values), starts)
    steps, scales = _int8(values, torch.arange(rows).repeat(len(bounds)).repeat_interleave(counts), rows)
    return PanelWeight(packed.shape, mask, in_huge_pages(steps), starts, scales)


def _int8(values: Tensor, row_of_value: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Values in steps of their row's scale, and the scales."""
    if not values.isfinite().all():
        raise ValueError("a weight with values that are not finite has no int8 form. Check the checkpoint.")
    largest = torch.zeros(rows).scatter_reduce_(0, row_of_value, values.float().abs(), "amax")
    scales = torch.where(largest > 0, largest / INT8_STEPS, 1.0)
    return (values.float() / scales[row_of_value]).round_().to(torch.int8), scales
