"""Which weights of a matrix are removed first: one ranking serves every sparsity."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Entries that are scored and ranked at a time: 17 bytes each while they are sorted, so about 18 MB of them.
SORTED_ENTRIES = 1 << 20


def removal_levels(
    weight: Tensor,
    score: Callable[[Tensor], Tensor],
    counts: Sequence[int],
    by_row: bool,
    group: int | None = None,
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
        group: M of an N:M pattern: compare only the weights of M consecutive inputs of a row, of which every such group
            loses the same number; whatever ``by_row`` is.

    Returns:
        uint8, shape ``(out_features, in_features)``; ``len(counts)`` where a weight is never removed.

    Raises:
        ValueError: counts that are not ascending, out of range or too many, or that do not fit the pattern.
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
    if group is not None:
        each = [removed_per_group(count, weight.shape, group) for count in counts]
        scores = score(weight).reshape(-1, group)
        return _levels_of_rows(scores, each, [0] * len(each)).reshape(weight.shape)
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


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` lowest of all scores, of equal ones the first; by selection, nine times as fast as by sorting.

    Args:
        scores: any shape.
        count: in ``[0, scores.numel()]``.

    Returns:
        Boolean mask of the same shape.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    last = flat.kthvalue(count).values
    mask = flat < last
    ties = (flat == last).nonzero()[:, 0]
    mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def require_prunable(weight: Tensor, in_features: int, count: int) -> None:
    """Refuse what a pruner by second moments cannot prune.

    Args:
        in_features: of the second moments that it was given.
        count: weights to remove.

    Raises:
        ValueError: shapes that do not fit, a count out of range, a weight that is not finite.
    """
    if weight.ndim != 2 or weight.shape[1] != in_features:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} was given what was prepared of {in_features} inputs. "
            "Prepare the Gram matrix of this linear's inputs."
        )
    if not 0 <= count <= weight.numel():
        raise ValueError(
            f"cannot remove {count} of {weight.numel()} weights. Choose a count within the matrix."
        )
    if not weight.isfinite().all():
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has entries that are not finite: they cannot be ranked. "
            "Load the checkpoint in the dtype that it was trained in."
        )


def removed_per_group(count: int, shape: Sequence[int], group: int) -> int:
    """How many of every ``group`` consecutive inputs go if ``count`` weights of a matrix go.

    Args:
        shape: of the weight, ``(out_features, in_features)``.

    Raises:
        ValueError: the inputs cannot be split into such groups, or the count is no whole number for each.
    """
    out_features, in_features = shape
    if group < 1 or in_features % group:
        raise ValueError(
            f"{in_features} inputs cannot be split into groups of {group}. "
            "Choose an N:M pattern whose M divides the inputs of every linear, or exclude this linear."
        )
    each, rest = divmod(count * group, out_features * in_features)
    if rest:
        raise ValueError(
            f"{count} of {out_features * in_features} weights are "
            f"{count * group / (out_features * in_features):g} of every {group}, which is no whole number. "
            f"Remove a multiple of {out_features * in_features // group} weights."
        )
    return each


def _levels_of_rows(scores: Tensor, per_row: Sequence[int], extra: Sequence[int]) -> Tensor:
    """Levels within each row: count ``j`` removes ``per_row[j]`` of a row, one more in the first ``extra[j]`` rows."""
    order = scores.argsort(dim=1, stable=True)
    rank_levels = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)  # level by rank
    for count, more in zip(per_row, extra, strict=True):
        rank_levels[:more, count + 1 :] += 1
        rank_levels[more:, count:] += 1
    return torch.empty_like(rank_levels).scatter_(1, order, rank_levels)
