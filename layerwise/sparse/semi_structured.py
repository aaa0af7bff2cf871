"""2:4 sparsity in the layout of ``torch.sparse``'s semi-structured tensors (CUTLASS): half the values, and metadata.

Of every four consecutive inputs two are stored, and four bits say which: bits 0-1 the position of the first one, bits
2-3 that of the second. The bits of 16 inputs make one int16, the first four inputs lowest, so that a weight has
metadata of shape ``(out_features, in_features / 16)``, whose elements the tensor cores want in another order (see
``_interleaved``). ``torch.sparse.SparseSemiStructuredTensorCUTLASS(shape, values, metadata, None, None, None)`` is such
a tensor. torch's own conversion goes by what differs from zero, would lose -0.0, and is private; this one goes by bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.sparse.bitmask import bits_to_number, require_matrix, stored_weights

DTYPES = (torch.float16, torch.bfloat16)  # of float32, the tensor cores want one of two
ROWS, COLUMNS = 32, 64  # torch's kernels take multiples of these


def _code_of(kept: int) -> int:
    """Four bits that name two positions, by the four bits that say which weights must be stored."""
    by_need = sorted(
        (2, 3, 0, 1), key=lambda position: not kept >> position & 1
    )  # the order in which torch fills up
    first, second = sorted(by_need[:2])
    return first | second << 2


CODES = torch.tensor([_code_of(kept) for kept in range(16)], dtype=torch.uint8)


@dataclass(frozen=True)
class SemiStructuredWeight:
    """A 2:4 weight matrix as torch's sparse kernels take it; 9/16 of the dense size.

    Attributes:
        values: float16 or bfloat16, shape ``(out_features, in_features / 2)``.
        metadata: int16, shape ``(out_features, in_features / 16)``.

    Raises:
        TypeError: parts of another dtype.
        ValueError: parts that do not belong together.
    """

    values: Tensor
    metadata: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype not in DTYPES or self.metadata.dtype != torch.int16:
            raise TypeError(
                f"a 2:4 weight has float16 or bfloat16 values and int16 metadata, not {self.values.dtype} and "
                f"{self.metadata.dtype}. Read them as they were written."
            )
        rows, half = self.values.shape if self.values.ndim == 2 else (0, 1)
        if rows % ROWS or 2 * half % COLUMNS or tuple(self.metadata.shape) != (rows, half // 8):
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} and metadata of shape {tuple(self.metadata.shape)} are no "
                f"2:4 weight: it has {ROWS}n rows, {COLUMNS // 2}m values and {COLUMNS // 16}m metadata in each. They "
                "are of different weights, or damaged: read them again."
            )

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata."""
        return self.values.nbytes + self.metadata.nbytes


def is_semi_structured(weight: Tensor) -> bool:
    """Whether torch's sparse kernels could take ``weight``: at most two of every four consecutive inputs are stored.

    False for shapes and dtypes that they do not take.
    """
    if weight.ndim != 2 or weight.dtype not in DTYPES or weight.shape[0] % ROWS or weight.shape[1] % COLUMNS:
        return False
    return bool((stored_weights(weight).reshape(-1, 4).sum(dim=1, dtype=torch.uint8) <= 2).all())


def pack(weight: Tensor) -> SemiStructuredWeight:
    """The stored half of ``weight``.

    Args:
        weight: shape ``(out_features, in_features)``; left unchanged.

    Raises:
        ValueError: it is not 2:4, or of a shape or dtype that torch's sparse kernels do not take.
    """
    require_matrix(weight)
    if not is_semi_structured(weight):
        raise ValueError(
            f"a {weight.dtype} weight of shape {tuple(weight.shape)} is not 2:4 as torch's kernels want it: at most "
            f"two of every four consecutive inputs stored, outputs a multiple of {ROWS}, inputs of {COLUMNS}, "
            "float16 or bfloat16. Pack it as a bitmask."
        )
    rows, columns = weight.shape
    fours = weight.detach().contiguous().view(rows, columns // 4, 4)
    codes = CODES.to(weight.device)[bits_to_number(stored_weights(fours).view(torch.uint8)).int()]
    values = fours.gather(2, _positions(codes)).view(rows, columns // 2)
    low, high = codes.view(rows, -1, 2).unbind(2)
    return SemiStructuredWeight(values, _interleaved((low | high << 4).view(torch.int16)))


def unpack(packed: SemiStructuredWeight) -> Tensor:
    """The weight that was packed, bit for bit; shape ``(out_features, in_features)``."""
    rows, half = packed.values.shape
    both = _straightened(packed.metadata).view(torch.uint8)
    codes = torch.stack((both & 15, both >> 4), dim=2).view(rows, half // 2)
    fours = packed.values.new_zeros(rows, half // 2, 4)
    pairs = packed.values.view(rows, half // 2, 2)
    return fours.scatter_(2, _positions(codes), pairs).view(rows, 2 * half)


def _positions(codes: Tensor) -> Tensor:
    """The two stored positions of every four inputs, int64, along a last dimension of their own."""
    return torch.stack((codes & 3, codes >> 2), dim=-1).long()


def _interleaved(metadata: Tensor) -> Tensor:
    """The elements in the order in which CUTLASS reads them; the same shape.

    Of every 32 rows, row ``8 i + j`` moves to ``4 j + i``; then every block of two rows and two columns is transposed;
    then pairs of columns follow each other, all rows of the first pair first.
    """
    rows, columns = metadata.shape
    moved = metadata.reshape(rows // 32, 4, 8, columns).transpose(1, 2)
    blocks = moved.reshape(rows // 2, 2, columns // 2, 2)
    return blocks.permute(2, 0, 3, 1).reshape(rows, columns)


def _straightened(interleaved: Tensor) -> Tensor:
    """What ``_interleaved`` was given."""
    rows, columns = interleaved.shape
    blocks = interleaved.reshape(columns // 2, rows // 2, 2, 2).permute(1, 3, 0, 2)
    return blocks.reshape(rows // 32, 8, 4, columns).transpose(1, 2).reshape(rows, columns)
