"""2:4 sparsity in the layout of ``torch.sparse``'s semi-structured tensors (CUTLASS): half of the values, and metadata.

Two of every four consecutive inputs are stored. Four bits give their positions: bits 0-1 that of the first, bits 2-3
that of the second. The bits of 16 inputs form one int16, with the first four inputs in the lowest bits, so the metadata
has the shape ``(out_features, in_features / 16)``. The tensor cores need its elements in another order (see
``_interleaved``). ``torch.sparse.SparseSemiStructuredTensorCUTLASS(shape, values, metadata, None, None, None)`` creates
such a tensor. torch's own conversion is private, and loses -0.0 because it compares with zero; this one tests bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.sparse.bitmask import bits_to_number, require_matrix, stored_weights

DTYPES = (torch.float16, torch.bfloat16)  # for float32, the tensor cores need 1:2 instead of 2:4
ROWS, COLUMNS = 32, 64  # torch's kernels need multiples of these


def _code_of(kept: int) -> int:
    """Return the four bits of two positions, given a four-bit mask of the weights that must be stored."""
    # Positions of weights that need not be stored are used in the same order as in torch: 2, 3, 0, 1.
    by_need = sorted((2, 3, 0, 1), key=lambda position: not kept >> position & 1)
    first, second = sorted(by_need[:2])
    return first | second << 2


CODES = torch.tensor([_code_of(kept) for kept in range(16)], dtype=torch.uint8)


@dataclass(frozen=True)
class SemiStructuredWeight:
    """A 2:4 weight matrix in the format of torch's sparse kernels; 9/16 of the dense size.

    Attributes:
        values: float16 or bfloat16, shape ``(out_features, in_features / 2)``.
        metadata: int16, shape ``(out_features, in_features / 16)``.

    Raises:
        TypeError: a part has another dtype.
        ValueError: the parts do not match.
    """

    values: Tensor
    metadata: Tensor

    def __post_init__(self) -> None:
        if self.values.dtype not in DTYPES or self.metadata.dtype != torch.int16:
            raise TypeError(
                f"a 2:4 weight has float16 or bfloat16 values and int16 metadata, not {self.values.dtype} and "
                f"{self.metadata.dtype}. Read them in their stored dtypes."
            )
        rows, half = self.values.shape if self.values.ndim == 2 else (0, 1)
        if rows % ROWS or 2 * half % COLUMNS or tuple(self.metadata.shape) != (rows, half // 8):
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} and metadata of shape {tuple(self.metadata.shape)} are "
                f"not a 2:4 weight, which has {ROWS}n rows with {COLUMNS // 2}m values and {COLUMNS // 16}m metadata "
                "each. They are damaged or belong to different weights. Read them again."
            )

    @property
    def nbytes(self) -> int:
        """Return the size of values and metadata in bytes."""
        return self.values.nbytes + self.metadata.nbytes


def is_semi_structured(weight: Tensor) -> bool:
    """Return whether torch's sparse kernels support ``weight``.

    They need at most two stored weights among every four consecutive inputs, and certain shapes and dtypes.
    """
    if weight.ndim != 2 or weight.dtype not in DTYPES or weight.shape[0] % ROWS or weight.shape[1] % COLUMNS:
        return False
    return bool((stored_weights(weight).reshape(-1, 4).sum(dim=1, dtype=torch.uint8) <= 2).all())


def pack(weight: Tensor) -> SemiStructuredWeight:
    """Pack a 2:4 weight.

    Args:
        weight: shape ``(out_features, in_features)``; left unchanged.

    Raises:
        ValueError: the weight is not 2:4, or torch's sparse kernels do not support its shape or dtype.
    """
    require_matrix(weight)
    if not is_semi_structured(weight):
        raise ValueError(
            f"a {weight.dtype} weight of shape {tuple(weight.shape)} is not 2:4 as torch's kernels require: at most "
            f"two stored weights (nonzero or -0.0) among every four consecutive inputs, outputs a multiple of {ROWS}, inputs a multiple "
            f"of {COLUMNS}, float16 or bfloat16. Pack it as a bitmask."
        )
    rows, columns = weight.shape
    fours = weight.detach().contiguous().view(rows, columns // 4, 4)
    codes = CODES.to(weight.device)[bits_to_number(stored_weights(fours).view(torch.uint8)).int()]
    values = fours.gather(2, _positions(codes)).view(rows, columns // 2)
    low, high = codes.view(rows, -1, 2).unbind(2)
    return SemiStructuredWeight(values, _interleaved((low | high << 4).view(torch.int16)))


def unpack(packed: SemiStructuredWeight) -> Tensor:
    """Restore the packed weight bit for bit, shape ``(out_features, in_features)``."""
    rows, half = packed.values.shape
    both = _straightened(packed.metadata).view(torch.uint8)
    codes = torch.stack((both & 15, both >> 4), dim=2).view(rows, half // 2)
    fours = packed.values.new_zeros(rows, half // 2, 4)
    pairs = packed.values.view(rows, half // 2, 2)
    return fours.scatter_(2, _positions(codes), pairs).view(rows, 2 * half)


def _positions(codes: Tensor) -> Tensor:
    """Return the two stored positions of every four inputs, int64, in a new last dimension."""
    return torch.stack((codes & 3, codes >> 2), dim=-1).long()


def _interleaved(metadata: Tensor) -> Tensor:
    """Reorder the elements as CUTLASS reads them; the shape stays the same.

    In every 32 rows, row ``8 i + j`` moves to ``4 j + i``. Then every block of two rows and two columns is transposed.
    Then the pairs of columns are stored one after another, each with all of its rows.
    """
    rows, columns = metadata.shape
    moved = metadata.reshape(rows // 32, 4, 8, columns).transpose(1, 2)
    blocks = moved.reshape(rows // 2, 2, columns // 2, 2)
    return blocks.permute(2, 0, 3, 1).reshape(rows, columns)


def _straightened(interleaved: Tensor) -> Tensor:
    """Undo ``_interleaved``."""
    rows, columns = interleaved.shape
    blocks = interleaved.reshape(columns // 2, rows // 2, 2, 2).permute(1, 3, 0, 2)
    return blocks.reshape(rows // 32, 8, 4, columns).transpose(1, 2).reshape(rows, columns)
