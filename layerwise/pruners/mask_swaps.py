"""Improve a given mask without changing a weight, by exchanging removed weights for kept ones (arXiv:2512.10922)."""

import math

import torch
from torch import Tensor

# Weights of the rows that are refined together: 4 MB each for the few copies that are swept for every input.
SWEPT_ENTRIES = 1 << 20
# Swaps that gain less than this fraction of a row's error may be rounding, and could undo each other for ever.
LEAST_GAIN = 1e-6


def refine(weight: Tensor, mask: Tensor, gram: Tensor, rounds: int, group: int | None = None) -> Tensor:
    """Lower every row's error ``(w - w') gram (w - w')^T`` by swaps of one removed weight and one kept.

    A round goes through the inputs in order. Where a row has removed the input's weight, that weight comes back if some
    kept weight can go for it at a gain, and the one with the largest gain goes: gains are exact, with the
    interaction of the two. SparseSwaps looks for the best of all pairs before each swap; here the same number of
    evaluated pairs allows as many swaps as there are removed weights, and the end is the same: a row that a round
    leaves alone cannot be improved by any swap.

    Memory beside the result: some copies of ``SWEPT_ENTRIES`` weights (at least a row), none of pairs of inputs.

    Args:
        weight: shape ``(out_features, in_features)``; left unchanged.
        mask: same shape, ``True`` means "remove"; left unchanged.
        gram: sum of ``x x^T`` over the calibration tokens, shape ``(in_features, in_features)``, symmetric.
        rounds: at most so many; fewer if nothing can be improved any more.
        group: M of an N:M pattern: a weight is swapped with one of the same M consecutive inputs only.

    Returns:
        New mask with as many marks in every row (and group) as ``mask``.

    Raises:
        ValueError: shapes that do not fit, inputs that cannot be split into the groups, negative rounds, or values that
            are not finite.
    """
    in_features = gram.shape[0]
    if weight.ndim != 2 or mask.shape != weight.shape or gram.shape != (weight.shape[1], in_features):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)}, a mask of {tuple(mask.shape)} and a Gram matrix of "
            f"{tuple(gram.shape)} do not fit. Pass those of one linear, (out_features, in_features) and square."
        )
    if rounds < 0:
        raise ValueError(f"{rounds} rounds were asked for; pass 0 to leave the mask as it is, or more.")
    if group is not None and (group < 1 or in_features % group):
        raise ValueError(
            f"{in_features} inputs cannot be split into groups of {group}. "
            "Choose an N:M pattern whose M divides the inputs of every linear."
        )
    if not (weight.isfinite().all() and gram.isfinite().all()):
        raise ValueError(
            "the weight or its Gram matrix has entries that are not finite: swaps cannot be compared. "
            "Compute in bfloat16 or float32."
        )
    gram = gram.float()
    refined = mask.clone()
    step = max(1, SWEPT_ENTRIES // max(in_features, 1))
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        refined[rows] = _refine_rows(weight[rows].detach().float(), mask[rows], gram, rounds, group)
    return refined


def _refine_rows(weight: Tensor, mask: Tensor, gram: Tensor, rounds: int, group: int | None) -> Tensor:
    mask = mask.clone()
    unfinished = torch.arange(len(weight), device=weight.device)
    for _ in range(rounds):
        before = mask[unfinished]
        after = _sweep(weight[unfinished], before, gram, group or len(gram))
        mask[unfinished] = after
        unfinished = unfinished[(after != before).any(dim=1)]
        if not len(unfinished):
            break
    return mask


def _sweep(weight: Tensor, mask: Tensor, gram: Tensor, group: int) -> Tensor:
    """One round. Bringing back ``i`` and removing ``j`` changes the error by the sum of

    ``w_i (2 w_i G_ii - h_i)`` and ``w_j (h_j - 2 w_i G_ij)``, with ``h = 2 (w * mask) G + w * diag(G)``.
    """
    mask = mask.clone()
    errors = weight * mask
    products = errors @ gram
    least_gain = LEAST_GAIN * (products * errors).sum(dim=1)
    slopes = products.mul_(2).addcmul_(weight, gram.diagonal())
    forbidden = torch.zeros_like(weight).masked_fill_(
        mask, math.inf
    )  # what is removed cannot be removed again
    costs = torch.empty_like(weight[:, :group])
    for index in range(weight.shape[1]):
        returning = weight[:, index]
        partners = slice(index // group * group, index // group * group + group)
        torch.addcmul(slopes[:, partners], returning[:, None], gram[index, partners], value=-2, out=costs)
        torch.addcmul(forbidden[:, partners], weight[:, partners], costs, out=costs)
        # Least costs by amin: min, which finds the partner too, takes 17 times as long, and few rows need one.
        gains = returning * (slopes[:, index] - 2 * returning * gram[index, index]) - costs.amin(dim=1)
        rows = (mask[:, index] & (gains > least_gain)).nonzero()[:, 0]
        if not len(rows):
            continue
        leaving = costs[rows].argmin(dim=1) + partners.start
        mask[rows, index], mask[rows, leaving] = False, True
        forbidden[rows, index], forbidden[rows, leaving] = 0, math.inf
        change = weight[rows, leaving, None] * gram[leaving] - returning[rows, None] * gram[index]
        slopes[rows] += change.mul_(2)
    return mask
