"""Which weights of a matrix are removed first: one ranking serves every sparsity."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Entries that are scored and ranked at a time: 17 bytes each while they are sorted, so about 18 MB of them.
SORTED_ENTRIES = 1 << 20


def removal_levels(
    weight: Tensor, score: Callable[[Tensor], Tensor], counts: Sequence[int], by_row: bool
) -> Tensor:
    """For every weight, the index of the first count at which it is removed.

    Exactly ``counts[j]`` entries get a level ``<= j``, whatever the ties: of equal scores the first ones go
    first. The masks of increasing counts are nested, so ``levels <= j`` is the mask of ``counts[j]``.

    Args:
        weight: shape ``(out_features, in_features)``; left unchanged.
        score: gives the importance of some rows' weights, shape ``(rows, in_features)`` for the same.
        counts: numbers of weights to remove, ascending, each in ``[0, weight.numel()]``; at most 255 of them.
        by_row: compare weights within their row, every row losing the same number (the first rows one more
            where the count is not a multiple of the rows); otherwise compare all weights of the matrix.

    Returns:
        uint8, shape ``(out_features, in_features)``; ``len(counts)`` where a weight is never removed.

    Raises:
        ValueError: counts that are not ascending, out of range or too many.
    """
    numel = weight.numel()
    if (
        list(counts) != sorted(counts)
        or len(counts) > 255
        or any(not 0 <= count <= numel for count in counts)
    ):
        raise ValueError(
            f"cannot remove {list(counts)} of {numel} weights in turn: the counts must be ascending, "
            "within the matrix, and at most 255. Sort them, and split larger groups."
        )
    if not by_row:
        return _levels_of_rows(score(weight).reshape(1, -1), counts, [0] * len(counts)).reshape(weight.shape)
    rows, columns = weight.shape
    levels = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    step = max(1, SORTED_ENTRIES // max(columns, 1))
    for first in range(0, rows, step):
        scores = score(weight[first : first + step])
        extra = [min(max(count % rows - first, 0), len(scores)) for count in counts]
        levels[first : first + step] = _levels_of_rows(scores, [count // rows for count in counts], extra)
    return levels


def _levels_of_rows(scores: Tensor, per_row: Sequence[int], extra: Sequence[int]) -> Tensor:
    """Levels within each row: count ``j`` removes ``per_row[j]`` of a row, one more in the first ``extra[j]`` rows."""
    order = scores.argsort(dim=1, stable=True)
    rank_levels = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)  # level by rank
    for count, more in zip(per_row, extra, strict=True):
        rank_levels[:more, count + 1 :] += 1
        rank_levels[more:, count:] += 1
    return torch.empty_like(rank_levels).scatter_(1, order, rank_levels)
