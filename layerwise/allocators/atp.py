"""ATP: sparsity increases by a common difference beta from each decoder layer to the next (arXiv:2502.14770)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layerwise.allocators.sparsity_plan import SparsityPlan


@dataclass(frozen=True)
class ATP:
    """Increase sparsity by a common difference beta per decoder layer (arXiv:2502.14770)."""

    method: Literal["atp"] = "atp"


def mean_depth(layer_sizes: Sequence[int]) -> float:
    """Return the mean layer index of a prunable weight; ``(L - 1) / 2`` for layers of equal size."""
    return math.fsum(index * size for index, size in enumerate(layer_sizes)) / sum(layer_sizes)


def largest_beta(target: float, layer_sizes: Sequence[int]) -> float:
    """Return the largest common difference that keeps every layer's sparsity within [0, 1].

    The first layer must not fall below 0, and the last layer must not rise above 1. For L layers of equal size the
    limit is ``2 min(S, 1 - S) / (L - 1)``. In general, the progression equals the target at the parameter-weighted
    mean depth.

    Args:
        target: overall sparsity S, in [0, 1].
        layer_sizes: number of prunable weights of every layer.
    """
    depth = mean_depth(layer_sizes)
    if len(layer_sizes) < 2:
        return 0.0
    return min(target / depth, (1 - target) / (len(layer_sizes) - 1 - depth))


def arithmetic(target: float, beta: float, layer_sizes: Sequence[int]) -> SparsityPlan:
    """Return the plan whose sparsity increases by ``beta`` per layer (arXiv:2502.14770, equation 1).

    The parameter-weighted mean is ``target`` for every ``beta``. Beta 0 gives the uniform plan.

    Raises:
        ValueError: ``beta`` is outside the legal range (the message gives the range), or ``target`` is outside [0, 1).
    """
    if not 0 <= target < 1:
        raise ValueError(
            f"the overall sparsity is {target:g}; it must lie in [0, 1). Give the fraction of weights to remove."
        )
    largest = largest_beta(target, layer_sizes)
    if not 0 <= beta <= largest * (1 + 1e-12):
        raise ValueError(
            f"beta {beta:g} is outside the legal range [0, {largest:.5f}] for sparsity {target:g} and "
            f"{len(layer_sizes)} layers: the first or the last layer would leave [0, 1]. Choose a beta in this range."
        )
    depth = mean_depth(layer_sizes)
    layers = (target + beta * (index - depth) for index in range(len(layer_sizes)))
    return SparsityPlan(beta, tuple(min(max(sparsity, 0.0), 1.0) for sparsity in layers))
