"""LSA: layers whose output suffers more from losing half of their weights lose more (ICLR 2026, xq3lza5IjN).

That a larger error is taken for redundancy is the paper's finding, not a slip: errors grow with depth as the
activations do, and removing more from late layers is what works.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.allocators.budget import by_importance

# Published for 70 %; others: .04 at 50 %, .10 at 60 %, .12 at 80 %, and .07 for one sparsity per linear.
BETA = 0.15
# Columns within which the greedy choice is made, as published.
GROUP_SIZE = 128


@dataclass(frozen=True)
class LSA:
    """Sparsity rises linearly with the reconstruction error, over a range of ``2 * beta``."""

    beta: float = BETA
    method: Literal["lsa"] = "lsa"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(
                f"beta of LSA is {self.beta:g}; it must lie in [0, 1], in units of sparsity, e.g. {BETA:g}."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Sparsity of every entry, given its ``half_removed_error`` (of a layer: the plain mean over its linears)."""
        return lsa(scores, sizes, target, self.beta)


def half_removed_error(weight: Tensor, gram: Tensor, group_size: int = GROUP_SIZE) -> float:
    """Error of the output when half of every row's weights are removed, those that add least to it (algorithm 1).

    With P the removed inputs of a row, its error is ``w_P gram_PP w_P``, summed over the rows. Column group by column
    group, in every row, the weight goes that adds least given what is gone already: ``w_k**2 gram_kk`` plus twice its
    interactions with the removed ones, until half of the group's columns, rounded down, are gone; of equal ones the
    first. The error is not divided by the number of weights, as in the official code.

    Args:
        weight: shape ``(out_features, in_features)``; left unchanged.
        gram: sum of x x^T over the tokens, shape ``(in_features, in_features)``, symmetric. A common factor, such as
            one over the number of tokens, is a factor of the result; it must be the same for all layers.
        group_size: columns in a group.

    Returns:
        Squared Frobenius norm of the change of the output, over the tokens of ``gram``.

    Raises:
        ValueError: shapes that do not match, a group size below 1, or an error that is not finite.
    """
    in_features = weight.shape[-1]
    if weight.dim() != 2 or gram.shape != (in_features, in_features) or group_size < 1:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} in groups of {group_size} does not go with a Gram matrix of "
            f"shape {tuple(gram.shape)}: give (out_features, in_features), a positive group size, and the Gram "
            "matrix of those inputs."
        )
    dtype = torch.promote_types(gram.dtype, torch.float32)
    gram = gram.to(dtype)
    remaining = weight.to(dtype)
    removed = torch.zeros_like(remaining)
    error = 0.0
    for first in range(0, in_features, group_size):
        group = slice(first, min(first + group_size, in_features))
        interactions = removed[:, :first] @ gram[:first, group]
        removed[:, group], added = _half_removed(remaining[:, group], gram[group, group], interactions)
        error += added
    if not math.isfinite(error):
        raise ValueError(
            f"the error of a weight of shape {tuple(weight.shape)} is {error}. Look for infinite or NaN weights or "
            "activations."
        )
    return error


def _half_removed(weight: Tensor, gram: Tensor, interactions: Tensor) -> tuple[Tensor, float]:
    """Greedy choice within one group of columns.

    Args:
        weight: shape ``(out_features, columns)``.
        gram: among these columns, shape ``(columns, columns)``.
        interactions: gram times the weights that earlier groups removed, shape ``(out_features, columns)``.

    Returns:
        The removed weights, zero elsewhere, shape ``(out_features, columns)``; and the error they add.
    """
    cost = weight * (weight * gram.diagonal() + 2 * interactions)
    doubled = 2 * weight
    removed = torch.zeros_like(weight)
    added = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for _ in range(weight.shape[1] // 2):
        index = cost.argmin(dim=1, keepdim=True)
        added += cost.gather(1, index)[:, 0]
        chosen = weight.gather(1, index)
        removed.scatter_(1, index, chosen)
        cost.addcmul_(doubled * chosen, gram[index[:, 0]])
        cost.scatter_(1, index, math.inf)
    return removed, added.sum().item()


def lsa(
    errors: Sequence[float], sizes: Sequence[int], target: float, beta: float = BETA
) -> tuple[float, ...]:
    """Sparsities from the errors: the larger, the more is removed.

    The paper takes the importance ``1 - error / sum of the errors``, scaled to [0, 2 beta]; since importance is linear
    in the error, the normalisation by the sum drops out. For entries of unequal size the official code spreads
    the numbers of removed weights evenly, so that small linears deviate the more; here sparsity is spread.

    Args:
        errors: ``half_removed_error`` of every entry, a layer or a linear.
        sizes: number of weights of every entry.
        target: overall sparsity, met exactly by the size-weighted mean.
        beta: sparsities differ by up to twice this.
    """
    return by_importance([-error for error in errors], sizes, target, beta)
