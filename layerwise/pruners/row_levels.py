"""Levels of removal of the weights in each row, by selection instead of sorting.

The level of a weight is the index of the first of several counts at which it is removed. On a CPU, the native kernel
finds the levels from a histogram of each row. Without the kernel, unique integers are partitioned at the counts: the
bits of a score in the upper half, its column in the lower half. Both give the levels of a stable sort. The two zeros
are equal, and every NaN is equal to every other and above infinity, as in torch's sort. Other devices sort.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.sparse.native import SCORES, Kernel, kernel

# Memory per score, in bytes: a float32 score, its integer of 64 bits, its level, and the level by rank. The kernel needs
# the score, the level and, only if all scores are equal, 8 more.
SCORE_BYTES = 14
# Scores whose integers are made at a time, which limits the temporary memory.
CONVERTED_SCORES = 1 << 18
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def levels_of_rows(scores: Tensor, per_row: Sequence[int], extra: Sequence[int]) -> Tensor:
    """Return the level of each weight within its row; of equal scores the first are removed first.

    Args:
        scores: importance of each weight, shape ``(rows, columns)``.
        per_row: ascending numbers of weights to remove from every row; at most 255.
        extra: by count, the number of leading rows that lose one weight more.

    Returns:
        uint8, same shape; ``len(per_row)`` for a weight that is never removed.
    """
    if native := kernel_for(scores):
        return native.levels_of_rows(scores, per_row, extra)
    if scores.is_cpu and scores.element_size() <= 4:
        order = _partitioned_columns(scores, per_row)
    else:
        order = scores.argsort(dim=1, stable=True)
    by_rank = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for count, more in zip(per_row, extra, strict=True):
        by_rank[:more, count + 1 :] += 1
        by_rank[more:, count:] += 1
    return torch.empty_like(by_rank).scatter_(1, order, by_rank)


def kernel_for(scores: Tensor) -> Kernel | None:
    """Return the kernel if it can rank the scores; otherwise None."""
    return kernel() if scores.is_cpu and scores.dtype in SCORES else None


def ordered_integers(scores: Tensor) -> Tensor:
    """Return integers of the size of the scores, in the order of the scores; they can share memory with the scores.

    Args:
        scores: float16, bfloat16, float32 or float64, any shape.
    """
    bits = scores.view(INTEGERS[scores.element_size()])
    if not bits.numel():
        return bits
    infinity = torch.tensor(torch.inf, dtype=scores.dtype).view(bits.dtype).item()
    lowest, highest = bits.aminmax()
    if lowest >= 0 and highest <= infinity:  # the bits are in order if no score is negative or NaN
        return bits
    largest = torch.iinfo(bits.dtype).max
    magnitude = bits & largest
    return torch.where(bits < 0, -magnitude, magnitude).masked_fill_(scores.isnan(), largest)


def _partitioned_columns(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the columns of each row, the ``count`` lowest and the ``count + 1`` lowest scores first for every count."""
    rows, columns = scores.shape
    integers = torch.empty(scores.shape, dtype=torch.int64)
    step = max(1, CONVERTED_SCORES // max(rows, 1))
    for first in range(0, columns, step):
        upper = ordered_integers(scores[:, first : first + step])
        lower = torch.arange(first, first + upper.shape[1])
        torch.add(lower, upper, alpha=1 << 32, out=integers[:, first : first + step])
    # numpy's partition takes a quarter of the time of torch's sort of integers. The element at index `count` is in its
    # sorted place afterwards, so that both the `count` lowest and the `count + 1` lowest come first.
    if places := sorted({count for count in counts if count < columns}):
        integers.numpy().partition(places, axis=1)
    return integers.bitwise_and_(0xFFFFFFFF)
