"""Panel layout of a sparse weight for the kernel: panels of columns, each packed as a bitmask."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from layerwise.sparse.bitmask import BYTE_BITS, PackedWeight, pack, unpack
from layerwise.sparse.huge_pages import in_huge_pages

# The inputs of a panel (24 kB in float32) stay in the first-level cache (32 kB) while its weights are read.
PANEL_COLUMNS = 6144
PANEL_STEP = 64  # panel widths are multiples of this number of columns, as every instruction set requires
INT8_STEPS = 127  # steps on either side of zero


@dataclass(frozen=True)
class PanelWeight:
    """A weight matrix as masks and values, panel by panel, and row by row within a panel.

    Attributes:
        shape: shape of the dense weight, ``(out_features, in_features)``.
        mask: uint8, one-dimensional: the ``PackedWeight.mask`` of every panel.
        values: stored weights, one-dimensional; bfloat16, float32, or int8 in steps of the row's scale.
        starts: int64, shape ``(panels * out_features + 1,)``: index of the first value of every row of every panel,
            then the number of values.
        scales: float32, shape ``(out_features,)``: size of one int8 step; None for other dtypes.
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
        assert all(part.is_contiguous() for part in parts), "the kernel needs contiguous arrays"
        sizes = (self.mask.numel(), self.starts.numel(), self.values.numel())
        wanted = (mask_bytes, len(panels) * rows + 1, int(self.starts[-1]))
        if sizes != wanted or (self.scales is None) == (self.values.dtype == torch.int8):
            raise ValueError(
                f"a weight of shape {self.shape} with {self.values.dtype} values and "
                f"{'no' if self.scales is None else self.scales.numel()} scales has {sizes} mask bytes, starts and "
                f"values; {wanted} were expected. Create it with panels_of."
            )

    @property
    def nbytes(self) -> int:
        """Return the size of all parts in bytes."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.mask.nbytes + self.values.nbytes + self.starts.nbytes + scales

    def dense(self) -> Tensor:
        """Return the dense weight, shape ``(out_features, in_features)``; float32 if the values are int8."""
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
    """Return the number of columns of every panel but the last, at most ``PANEL_COLUMNS``; panels are nearly equal."""
    panels = max(1, -(-columns // PANEL_COLUMNS))
    return -(-columns // (panels * PANEL_STEP)) * PANEL_STEP


def panel_bounds(columns: int) -> list[tuple[int, int]]:
    """Return the start and end (exclusive) columns of every panel."""
    width = panel_width(columns)
    return [*pairwise([*range(0, columns, width), columns])]


def panels_of(packed: PackedWeight, int8: bool = False) -> PanelWeight:
    """Convert a packed weight to panels.

    Mask and values are copied into huge pages. A weight of more than one panel is unpacked during the conversion.

    Args:
        packed: weight with values in bfloat16 or float32.
        int8: whether to round the values to 127 steps on either side of zero; the step is the largest value of the
            row divided by 127.

    Raises:
        TypeError: the values have another dtype.
        ValueError: the weight is empty or, with ``int8``, not finite.
        OSError: there is not enough memory.
    """
    if packed.values.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(
            f"the sparse kernel multiplies bfloat16 and float32 weights, not {packed.values.dtype}. Convert the weight."
        )
    if 0 in packed.shape:
        raise ValueError(f"a weight of shape {packed.shape} is empty. Keep it dense.")
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
    """Return the values in steps of their row's scale, and the scales."""
    if not values.isfinite().all():
        raise ValueError(
            "a weight with NaN or infinity cannot be converted to int8. Replace the checkpoint by an undamaged copy."
        )
    largest = torch.zeros(rows).scatter_reduce_(0, row_of_value, values.float().abs(), "amax")
    scales = torch.where(largest > 0, largest / INT8_STEPS, 1.0)
    return (values.float() / scales[row_of_value]).round_().to(torch.int8), scales
