"""Wanda with swaps: improve Wanda's mask by exchanging removed and kept weights (SparseSwaps, arXiv:2512.10922).

The gain of a swap follows from the second moments of the inputs. The values of the remaining weights do not change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.models.nan_check import is_finite
from layerwise.pruners.masks import removal_levels

MOST_ROUNDS = 1000  # guards against a mistyped number that would make a run endless


@dataclass(frozen=True)
class WandaSwaps:
    """Improve Wanda's mask (arXiv:2306.11695) by swaps, see ``refine``.

    Attributes:
        rounds: maximum number of rounds through all inputs; on real layers, the first gives nine tenths of the gain.
    """

    method: Literal["wanda_swaps"] = "wanda_swaps"
    rounds: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rounds <= MOST_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}; it must be from 0 (plain Wanda) to {MOST_ROUNDS}.")

    def prepare(self, gram: Tensor, tokens: int, overwrite: bool = False) -> Tensor:
        """Return the second moments unchanged.

        Args:
            gram: sum of ``x x^T`` over the tokens, shape ``(in_features, in_features)``.
            tokens: number of tokens.
            overwrite: without effect.

        Raises:
            ValueError: ``tokens`` is 0.
        """
        if tokens < 1:
            raise ValueError(
                f"swaps need second moments, but they come from {tokens} tokens. Pass at least one window."
            )
        return gram

    def prune(self, weight: Tensor, prepared: Tensor, count: int, group: int | None = None) -> Tensor:
        """Return the weight with ``count`` entries set to zero.

        Every row loses the same number of weights, the first rows one more if ``count`` is not a multiple of the rows.

        Args:
            weight: shape ``(out_features, in_features)``; left unchanged.
            prepared: result of ``prepare`` for the linear's inputs.
            count: number of weights to remove.
            group: M of an N:M pattern; None without a pattern.

        Raises:
            ValueError: the count is out of range or does not fit the pattern, or values are not finite.
        """
        norms = prepared.diagonal().sqrt()

        def score(rows: Tensor) -> Tensor:
            return rows.abs().float() * norms

        counts: Sequence[int] = [count]
        mask = removal_levels(weight, score, counts, by_row=True, group=group) == 0
        return weight.masked_fill(refine(weight, mask, prepared, self.rounds, group), 0)


# Weights in the rows that are refined at a time: 4 MB for each of the few copies that are read for every input.
SWEPT_ENTRIES = 1 << 20
# Smallest gain, as a fraction of a row's error. Smaller gains may be rounding errors and undo each other endlessly.
LEAST_GAIN = 1e-6


def refine(weight: Tensor, mask: Tensor, gram: Tensor, rounds: int, group: int | None = None) -> Tensor:
    """Lower every row's error ``(w - w') gram (w - w')^T`` by swapping removed and kept weights (arXiv:2512.10922).

    A round visits the inputs in order. If a row's weight of this input is removed, and restoring it while removing a
    kept weight lowers the error, the swap with the largest gain is made. Gains are exact, including the interaction of
    the two weights. SparseSwaps searches for the best of all pairs before each swap. Here, the same number of evaluated
    pairs allows as many swaps as there are removed weights. The end is the same: a row that a round does not change
    cannot be improved by any swap.

    Memory in addition to the result: a few copies of ``SWEPT_ENTRIES`` weights (at least one row); nothing of the size
    of all pairs of inputs.

    Args:
        weight: shape ``(out_features, in_features)``; left unchanged.
        mask: same shape, ``True`` means "remove"; left unchanged.
        gram: sum of ``x x^T`` over the calibration tokens, shape ``(in_features, in_features)``, symmetric.
        rounds: maximum number of rounds; refinement stops earlier if nothing can be improved.
        group: M of an N:M pattern: swaps are within M consecutive inputs. None without a pattern.

    Returns:
        New mask with the same number of marks in every row (and group) as ``mask``.

    Raises:
        ValueError: shapes do not match, the inputs cannot be split into groups, ``rounds`` is negative, or values are
            not finite.
    """
    in_features = gram.shape[0]
    if weight.ndim != 2 or mask.shape != weight.shape or gram.shape != (weight.shape[1], in_features):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)}, a mask of {tuple(mask.shape)} and a Gram matrix of "
            f"{tuple(gram.shape)} do not match. Pass weight and mask (out_features, in_features) and the square Gram "
            "matrix of one linear."
        )
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}; it must be 0 (no swaps) or more.")
    if group is not None and (group < 1 or in_features % group):
        raise ValueError(
            f"{in_features} inputs cannot be split into groups of {group}. "
            "Choose an N:M pattern whose M divides the inputs of every linear."
        )
    if not (is_finite(weight) and is_finite(gram)):
        raise ValueError(
            "the weight or its Gram matrix contains NaN or infinity, so swaps cannot be compared. "
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
    """Make one round of swaps.

    Restoring ``i`` and removing ``j`` changes the error by ``w_i (2 w_i G_ii - h_i) + w_j (h_j - 2 w_i G_ij)``, with
    ``h = 2 (w * mask) G + w * diag(G)``.
    """
    mask = mask.clone()
    errors = weight * mask
    products = errors @ gram
    least_gain = LEAST_GAIN * (products * errors).sum(dim=1)
    slopes = products.mul_(2).addcmul_(weight, gram.diagonal())
    # Infinite for removed weights, which cannot be removed again.
    forbidden = torch.zeros_like(weight).masked_fill_(mask, math.inf)
    costs = torch.empty_like(weight[:, :group])
    for index in range(weight.shape[1]):
        returning = weight[:, index]
        partners = slice(index // group * group, index // group * group + group)
        torch.addcmul(slopes[:, partners], returning[:, None], gram[index, partners], value=-2, out=costs)
        torch.addcmul(forbidden[:, partners], weight[:, partners], costs, out=costs)
        # amin gives the lowest cost only. min, which also gives its index, takes 17 times as long, and few rows swap.
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
