"""Bitmask packing: a sparse weight as a mask with one bit per weight, and the values of the stored weights."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# Integer dtypes of the same width: a weight is stored if any of its bits is set, which preserves -0.0.
BITS_OF = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
BYTE_BITS = torch.tensor([byte.bit_count() for byte in range(256)])
# Entries that are selected at a time: torch needs 16 bytes for each stored one, so at most 16 MB.
SELECTED_ENTRIES = 1 << 20


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix without its zeros.

    Needs one bit per weight and one element per stored weight: ``1 - s + 1 / 16`` of the dense size for a 16-bit dtype
    at sparsity s.

    Attributes:
        shape: shape of the dense weight, ``(out_features, in_features)``.
        mask: uint8, shape ``(out_features, ceil(in_features / 8))``. Bit ``k % 8`` (bit 0 is the lowest) of byte
            ``k // 8`` of a row is 1 if weight ``k`` of that row is stored. Bits beyond ``in_features`` are 0.
        values: stored weights row by row, one-dimensional, in the dtype of the weight: float16, bfloat16 or float32.

    Raises:
        ValueError: the parts do not match.
        TypeError: mask or values have another dtype.
    """

    shape: tuple[int, int]
    mask: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        require_packable(self.values)
        if self.mask.dtype != torch.uint8:
            raise TypeError(
                f"the mask of a packed weight is uint8, not {self.mask.dtype}. Read it in its stored dtype."
            )
        rows, columns = self.shape
        if tuple(self.mask.shape) != (rows, -(-columns // 8)) or self.values.ndim != 1:
            raise ValueError(
                f"a packed weight of shape {self.shape} has a mask of shape {(rows, -(-columns // 8))} and "
                f"one-dimensional values, but these have the shapes {tuple(self.mask.shape)} and "
                f"{tuple(self.values.shape)}. They are damaged or belong to different weights. Read them again."
            )
        counts = self.mask.flatten().bincount(minlength=256)
        if (marked := int(counts @ BYTE_BITS.to(counts.device))) != self.values.numel():
            raise ValueError(
                f"the mask marks {marked} weights as stored, but there are {self.values.numel()} values. They are "
                "damaged or belong to different weights. Read them again."
            )
        if columns % 8 and bool((self.mask[:, -1] >> columns % 8).any()):
            raise ValueError(
                f"the mask marks weights beyond the {columns} inputs of a row. It is damaged or belongs to another "
                "weight. Read it again."
            )

    @property
    def nbytes(self) -> int:
        """Return the size of mask and values in bytes."""
        return self.mask.nbytes + self.values.nbytes


def pack(weight: Tensor) -> PackedWeight:
    """Pack a weight without its zeros.

    Args:
        weight: float16, bfloat16 or float32, shape ``(out_features, in_features)``; left unchanged.

    Raises:
        TypeError: the weight has another dtype.
        ValueError: the weight is not a matrix.
    """
    require_packable(weight)
    require_matrix(weight)
    rows, columns = weight.shape
    weight = weight.detach().contiguous()
    stored = stored_weights(weight)
    step = max(1, SELECTED_ENTRIES // max(columns, 1))
    blocks = [slice(first, first + step) for first in range(0, rows, step)]
    values = torch.cat([weight.new_empty(0), *(weight[block][stored[block]] for block in blocks)])
    eights = pad(stored.view(torch.uint8), (0, -columns % 8)).view(rows, -(-columns // 8), 8)
    return PackedWeight((rows, columns), bits_to_number(eights), values)


def unpack(packed: PackedWeight) -> Tensor:
    """Restore the packed weight bit for bit, shape ``(out_features, in_features)``."""
    rows, columns = packed.shape
    places = torch.arange(8, dtype=torch.uint8, device=packed.mask.device)
    stored = (packed.mask[:, :, None] >> places).bitwise_and_(1).flatten(1)[:, :columns].bool()
    return packed.values.new_zeros(packed.shape).masked_scatter_(stored, packed.values)


def stored_weights(weight: Tensor) -> Tensor:
    """Mark the weights that have any bit set; bool, same shape as ``weight``."""
    return weight.detach().view(BITS_OF[weight.dtype]) != 0


def bits_to_number(bits: Tensor) -> Tensor:
    """Combine the bits along the last dimension into numbers, the lowest bit first.

    Args:
        bits: uint8 zeros and ones, with at most 8 entries in the last dimension.

    Returns:
        uint8, without the last dimension.
    """
    number = bits[..., 0].clone()
    for place in range(1, bits.shape[-1]):  # torch.sum over such a short dimension takes twice as long
        number |= bits[..., place] << place
    return number


def require_packable(weight: Tensor) -> None:
    """Raise if the dtype of a weight cannot be packed.

    Raises:
        TypeError: the dtype is not supported.
    """
    if weight.dtype not in BITS_OF:
        raise TypeError(
            f"a {weight.dtype} weight cannot be packed. Convert it to one of {', '.join(map(str, BITS_OF))}, or keep "
            "it dense."
        )


def require_matrix(weight: Tensor) -> None:
    """Raise if a weight is not a matrix.

    Raises:
        ValueError: the weight does not have two dimensions.
    """
    if weight.ndim != 2:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} cannot be packed, because it is not a matrix. Keep it dense, or "
            "reshape it to (out_features, in_features)."
        )
