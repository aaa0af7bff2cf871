"""Masks from scores of weights: nested masks for several sparsities from one ranking."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from layerwise.pruners.row_levels import INTEGERS, kernel_for, levels_of_rows, ordered_integers

# Entries that are scored and ranked at a time: ``row_levels.SCORE_BYTES`` each, about 15 MB in total.
RANKED_ENTRIES = 1 << 20
COUNTED_ENTRIES = 1 << 18  # half a megabyte in bfloat16: stays in the processor's cache


def removal_levels(
    weight: Tensor,
    score: Callable[[Tensor], Tensor],
    counts: Sequence[int],
    by_row: bool,
    group: int | None = None,
) -> Tensor:
    """Return, for every weight, the index of the first count at which it is removed.

    Exactly ``counts[j]`` entries have a level ``<= j``; of equal scores the first are removed first. The masks of
    increasing counts are nested, so ``levels <= j`` is the mask of ``counts[j]``.

    Args:
        weight: shape ``(out_features, in_features)``; left unchanged.
        score: maps rows of the weight to the importance of their entries, shape ``(rows, in_features)`` for both.
        counts: numbers of weights to remove, ascending, each in ``[0, weight.numel()]``; at most 255 numbers.
        by_row: whether to compare weights within their row and remove the same number from every row (one more from
            the first rows if a count is not a multiple of the rows). Otherwise all weights are compared.
        group: M of an N:M pattern: compare weights within M consecutive inputs of a row and remove the same number from
            every such group; ``by_row`` is ignored. None without a pattern.

    Returns:
        uint8, shape ``(out_features, in_features)``; ``len(counts)`` for a weight that is never removed.

    Raises:
        ValueError: the counts are not ascending, out of range, too many, or do not fit the pattern.
    """
    numel = weight.numel()
    if (
        list(counts) != sorted(counts)
        or len(counts) > 255
        or any(not 0 <= count <= numel for count in counts)
    ):
        raise ValueError(
            f"the counts {list(counts)} of weights to remove are invalid for a matrix of {numel} weights. Pass at most "
            "255 ascending counts from 0 to the size of the matrix."
        )
    none = [0] * len(counts)
    if group is None and not by_row:
        return levels_of_rows(score(weight).reshape(1, -1), counts, none).reshape(weight.shape)
    in_groups = (
        [removed_per_group(count, weight.shape, group) for count in counts] if group is not None else none
    )
    rows, columns = weight.shape
    levels = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    step = max(1, RANKED_ENTRIES // max(columns, 1))
    for first in range(0, rows, step):
        scores = score(weight[first : first + step])
        if group is not None:
            ranked = levels_of_rows(scores.reshape(-1, group), in_groups, none).reshape(scores.shape)
        else:
            extra = [min(max(count % rows - first, 0), len(scores)) for count in counts]
            ranked = levels_of_rows(scores, [count // rows for count in counts], extra)
        levels[first : first + step] = ranked
    return levels


def count_zeros(weight: Tensor) -> int | Tensor:
    """Return the number of weights that are zero, of either sign.

    On a device other than the CPU, as a scalar there: reading it waits for the computation.
    """
    if weight.device.type != "cpu":
        return weight.numel() - weight.count_nonzero()
    nonzero, step = 0, max(1, COUNTED_ENTRIES // max(weight.shape[-1], 1))
    for rows in weight.detach().split(step):
        # Without the bit of the sign. torch's count_nonzero takes 17 times as long in bfloat16.
        nonzero += int(np.count_nonzero(rows.view(INTEGERS[rows.element_size()]).numpy() << 1))
    return weight.numel() - nonzero


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` lowest scores; of equal scores the first.

    Args:
        scores: any shape.
        count: number of entries to mark, in ``[0, scores.numel()]``.

    Returns:
        Boolean mask of the same shape.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if kernel_for(scores):
        return levels_of_rows(scores.reshape(1, -1), [count], [0]).reshape(scores.shape) == 0
    flat = ordered_integers(scores.flatten())
    last = flat.kthvalue(count).values
    mask = flat < last
    ties = (flat == last).nonzero()[:, 0]
    mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def require_prunable(weight: Tensor, in_features: int, count: int) -> None:
    """Raise if a pruner that uses second moments cannot prune a weight.

    Args:
        weight: shape ``(out_features, in_features)``.
        in_features: number of inputs of the second moments.
        count: number of weights to remove.

    Raises:
        ValueError: the shapes do not match, the count is out of range, or the weight is not finite.
    """
    if weight.ndim != 2 or weight.shape[1] != in_features:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not match second moments of {in_features} inputs. "
            "Prepare the Gram matrix of this linear's inputs."
        )
    if not 0 <= count <= weight.numel():
        raise ValueError(
            f"cannot remove {count} of {weight.numel()} weights. Choose a count from 0 to {weight.numel()}."
        )
    if not weight.isfinite().all():
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} contains NaN or infinity and cannot be ranked. "
            "Load the checkpoint in the dtype in which it was trained."
        )


def removed_per_group(count: int, shape: Sequence[int], group: int) -> int:
    """Return the number of weights to remove from every group if ``count`` weights are removed from a matrix.

    Args:
        count: number of weights to remove from the matrix.
        shape: shape of the weight, ``(out_features, in_features)``.
        group: number of consecutive inputs in a group.

    Raises:
        ValueError: the inputs cannot be split into groups, or the number per group is not an integer.
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
            f"removing {count} of {out_features * in_features} weights removes "
            f"{count * group / (out_features * in_features):g} of every {group}, which is not an integer. "
            f"Remove a multiple of {out_features * in_features // group} weights."
        )
    return each
