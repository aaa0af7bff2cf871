"""LSA: remove more from layers whose output changes more when half of their weights go (ICLR 2026, xq3lza5IjN).

The direction is intended: the paper reads a larger error as redundancy. Errors grow with depth as activations do, and
removing more from late layers works better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.allocators.budget import by_importance

# Published value for 70 %. Others: .04 at 50 %, .10 at 60 %, .12 at 80 %, and .07 for one sparsity per linear.
BETA = 0.15
# Number of columns in a group of the greedy algorithm, as published.
GROUP_SIZE = 128


@dataclass(frozen=True)
class LSA:
    """Increase sparsity linearly with the reconstruction error, over a range of ``2 * beta``."""

    beta: float = BETA
    method: Literal["lsa"] = "lsa"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(
                f"beta of LSA is {self.beta:g}; it must lie in [0, 1]. Give a sparsity, e.g. {BETA:g}."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every entry from its ``half_removed_error`` (for a layer, the mean over its linears)."""
        return lsa(scores, sizes, target, self.beta)


def half_removed_error(weight: Tensor, gram: Tensor) -> float:
    """Return the error of the output when half of every row's weights are removed greedily (algorithm 1).

    With P the removed inputs of a row, the row's error is ``w_P gram_PP w_P``; errors are summed over the rows. The
    columns are processed in groups of ``GROUP_SIZE``. In every row, the weight that adds least to the error, given the weights already
    removed, goes next: it adds ``w_k**2 gram_kk`` plus twice its interactions with the removed weights. This is
    repeated until half of the group's columns, rounded down, are removed. Of equal weights the first goes. As in the
    official code, the error is not divided by the number of weights.

    Args:
        weight: shape ``(out_features, in_features)``; left unchanged.
        gram: sum of x x^T over the tokens, shape ``(in_features, in_features)``, symmetric. A factor, such as one over
            the number of tokens, scales the result; it must be the same for all layers.

    Returns:
        Squared Frobenius norm of the change of the output, over the tokens of ``gram``.

    Raises:
        ValueError: the shapes do not match, or the error is not finite.
    """
    in_features = weight.shape[-1]
    if weight.dim() != 2 or gram.shape != (in_features, in_features):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not match a Gram matrix of shape {tuple(gram.shape)}. Pass a "
            "weight (out_features, in_features) and the Gram matrix of its inputs."
        )
    dtype = torch.promote_types(gram.dtype, torch.float32)
    gram = gram.to(dtype)
    remaining = weight.to(dtype)
    removed = torch.zeros_like(remaining)
    error = 0.0
    for first in range(0, in_features, GROUP_SIZE):
        group = slice(first, min(first + GROUP_SIZE, in_features))
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
    """Remove half of the columns of one group greedily, in every row.

    Args:
        weight: shape ``(out_features, columns)``.
        gram: Gram matrix of these columns, shape ``(columns, columns)``.
        interactions: the weights removed in earlier groups times the Gram matrix, shape ``(out_features, columns)``.

    Returns:
        Removed weights, zero elsewhere, shape ``(out_features, columns)``, and the error that they add.
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
    """Compute sparsities from errors: a larger error gives a higher sparsity.

    The paper uses the importance ``1 - error / sum of the errors``, scaled to [0, 2 beta]. Importance is linear in the
    error, so the division by the sum has no effect. For entries of unequal size the official code maps importance to
    numbers of removed weights, so that the sparsity of small linears varies more; here it is mapped to sparsity.

    Args:
        errors: ``half_removed_error`` of every entry (a layer or a linear).
        sizes: number of weights of every entry.
        target: overall sparsity; the size-weighted mean equals it.
        beta: half the largest difference between two sparsities.
    """
    return by_importance([-error for error in errors], sizes, target, beta)
