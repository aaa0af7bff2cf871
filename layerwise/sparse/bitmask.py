"""Bitmask packing: a sparse weight as one bit per weight and the values of those that are stored."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# Integers of the same width: whether a weight is stored goes by its bits, so that -0.0 comes back as -0.0.
BITS_OF = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
BYTE_BITS = torch.tensor([byte.bit_count() for byte in range(256)])
# Entries that are selected at a time: torch notes 16 bytes for each stored one, so at most 16 MB.
SELECTED_ENTRIES = 1 << 20


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix without its zeros.

    Takes ``1 / 8`` byte per weight and an item per stored weight: at sparsity s of a 16-bit dtype, ``1 - s + 1 / 16``
    of the dense size.

    Attributes:
        shape: of the dense weight, ``(out_features, in_features)``.
        mask: uint8, shape ``(out_features, ceil(in_features / 8))``. Bit ``k % 8`` (bit 0 is the lowest) of byte
            ``k // 8`` of a row is 1 if weight ``k`` of that row is stored; the bits beyond ``in_features`` are 0.
        values: the stored weights row by row, one-dimensional, in the dtype of the weight: float16, bfloat16 or
            float32.

    Raises:
        ValueError: parts that do not belong together.
        TypeError: mask or values of another dtype.
    """

    shape: tuple[int, int]
    mask: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        require_packable(self.values)
        if self.mask.dtype != torch.uint8:
            raise TypeError(
                f"the mask of a packed weight is uint8, not {self.mask.dtype}. Read it as it was written."
            )
        rows, columns = self.shape
        if tuple(self.mask.shape) != (rows, -(-columns // 8)) or self.values.ndim != 1:
            raise ValueError(
                f"a weight of shape {self.shape} is packed into a mask of shape {(rows, -(-columns // 8))} and a "
                f"row of values, but these have the shapes {tuple(self.mask.shape)} and "
                f"{tuple(self.values.shape)}. They are of different weights, or damaged: read them again."
            )
        counts = self.mask.flatten().bincount(minlength=256)
        if (marked := int(counts @ BYTE_BITS.to(counts.device))) != self.values.numel():
            raise ValueError(
                f"the mask marks {marked} weights as stored, but there are {self.values.numel()} values. They are of "
                "different weights, or damaged: read them again."
            )
        if columns % 8 and bool((self.mask[:, -1] >> columns % 8).any()):
            raise ValueError(
                f"the mask marks weights beyond the {columns} inputs of a row. It is of another weight, or damaged: "
                "read it again."
            )

    @property
    def nbytes(self) -> int:
        """Bytes of mask and values."""
        return self.mask.nbytes + self.values.nbytes


def pack(weight: Tensor) -> PackedWeight:
    """``weight`` without its zeros.

    Args:
        weight: float16, bfloat16 or float32, shape ``(out_features, in_features)``; left unchanged.

    Raises:
        TypeError: another dtype.
        ValueError: no matrix.
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
    """The weight that was packed, bit for bit; shape ``(out_features, in_features)``."""
    rows, columns = packed.shape
    places = torch.arange(8, dtype=torch.uint8, device=packed.mask.device)
    stored = (packed.mask[:, :, None] >> places).bitwise_and_(1).flatten(1)[:, :columns].bool()
    return packed.values.new_zeros(packed.shape).masked_scatter_(stored, packed.values)


def stored_weights(weight: Tensor) -> Tensor:
    """Which weights have bits that are not all zero; bool, the shape of ``weight``."""
    return weight.detach().view(BITS_OF[weight.dtype]) != 0


def bits_to_number(bits: Tensor) -> Tensor:
    """The number whose bits lie along the last dimension, at most 8 of them, each 0 or 1, the lowest first.

    Args:
        bits: uint8.

    Returns:
        uint8, without the last dimension.
    """
    number = bits[..., 0].clone()
    for place in range(1, bits.shape[-1]):  # a sum along so short a dimension takes twice the time
        number |= bits[..., place] << place
    return number


def require_packable(weight: Tensor) -> None:
    """Refuse dtypes that weights are not pruned in.

    Raises:
        TypeError: names the dtype.
    """
    if weight.dtype not in BITS_OF:
        raise TypeError(
            f"a {weight.dtype} weight cannot be packed; {', '.join(map(str, BITS_OF))} can. Convert it, or keep it "
            "dense."
        )


def require_matrix(weight: Tensor) -> None:
    """Refuse what is no matrix.

    Raises:
        ValueError: names the shape.
    """
    if weight.ndim != 2:
        raise ValueError(
            f"only a matrix can be packed, and this weight has the shape {tuple(weight.shape)}. Keep it dense, or "
            "reshape it to (out_features, in_features)."
        )
