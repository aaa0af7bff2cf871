"""Wanda's masks, improved by swaps: second moments decide which weights go; those that stay are untouched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.pruners.masks import removal_levels

MOST_ROUNDS = 1000  # a search with a typing error would not end


@dataclass(frozen=True)
class WandaSwaps:
    """Starts from Wanda's mask (arXiv:2306.11695); see ``mask_swaps.refine`` for the swaps.

    Attributes:
        rounds: of swaps at most, each through all inputs; on real layers the first brings nine tenths of the gain.
    """

    method: Literal["wanda_swaps"] = "wanda_swaps"
    rounds: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rounds <= MOST_ROUNDS:
            raise ValueError(
                f"rounds is {self.rounds}; it must be at least 0, which is Wanda itself, and at most {MOST_ROUNDS}."
            )

    def prepare(self, gram: Tensor, tokens: int) -> Tensor:
        """The second moments as they are.

        Args:
            gram: sum of ``x x^T`` over the tokens, shape ``(in_features, in_features)``.
            tokens: how many.

        Raises:
            ValueError: no token.
        """
        if tokens < 1:
            raise ValueError("swaps need second moments, but there was no token. Pass at least one window.")
        return gram

    def prune(self, weight: Tensor, prepared: Tensor, count: int, group: int | None = None) -> Tensor:
        """The weight with ``count`` entries zero and all others as they were.

        Every row loses the same number, the first ones one more where ``count`` is not a multiple of the rows.

        Args:
            weight: shape ``(out_features, in_features)``; left unchanged.
            prepared: of the linear's inputs, see ``prepare``.
            count: how many weights to remove.
            group: M of an N:M pattern; None for none.

        Raises:
            ValueError: a count that is out of range or does not fit the pattern; values that are not finite.
        """
        norms = prepared.diagonal().sqrt()

        def score(rows: Tensor) -> Tensor:
            return rows.abs().float() * norms

        counts: Sequence[int] = [count]
        mask = removal_levels(weight, score, counts, by_row=True, group=group) == 0
        return weight.masked_fill(refine(weight, mask, prepared, self.rounds, group), 0)


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
