"""ATP: sparsity grows by one common difference from each decoder layer to the next (arXiv:2502.14770)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layerwise.allocators.sparsity_plan import SparsityPlan


@dataclass(frozen=True)
class ATP:
    """Sparsity rises from each decoder layer to the next by one common difference beta (arXiv:2502.14770)."""

    method: Literal["atp"] = "atp"


def mean_depth(layer_sizes: Sequence[int]) -> float:
    """Mean position of a prunable weight along the depth, first layer 0; ``(L - 1) / 2`` for layers of equal size."""
    return math.fsum(index * size for index, size in enumerate(layer_sizes)) / sum(layer_sizes)


def largest_beta(target: float, layer_sizes: Sequence[int]) -> float:
    """Largest common difference that leaves every layer's sparsity within [0, 1].

    Both bounds: the first layer must not fall below 0, the last one not rise above 1. For layers of equal
    size it is ``2 min(S, 1 - S) / (L - 1)``; in general the arithmetic progression turns about the
    parameter-weighted mean depth.

    Args:
        target: overall sparsity S, in [0, 1].
        layer_sizes: number of prunable weights of every layer, L of them.
    """
    depth = mean_depth(layer_sizes)
    if len(layer_sizes) < 2:
        return 0.0
    return min(target / depth, (1 - target) / (len(layer_sizes) - 1 - depth))


def arithmetic(target: float, beta: float, layer_sizes: Sequence[int]) -> SparsityPlan:
    """ATP: sparsity grows by ``beta`` from each layer to the next (arXiv:2502.14770, equation 1).

    The parameter-weighted mean over the layers is ``target`` whatever ``beta`` is; beta 0 is the uniform
    plan.

    Raises:
        ValueError: a beta outside of the legal range, with the range; a target outside [0, 1).
    """
    if not 0 <= target < 1:
        raise ValueError(
            f"the overall sparsity is {target:g}; it must lie in [0, 1), as the fraction removed."
        )
    largest = largest_beta(target, layer_sizes)
    if not 0 <= beta <= largest * (1 + 1e-12):
        raise ValueError(
            f"beta {beta:g} is outside of the legal range [0, {largest:.5f}] for sparsity {target:g} and "
            f"{len(layer_sizes)} layers: the first or the last layer would leave [0, 1]. Choose a beta within it."
        )
    depth = mean_depth(layer_sizes)
    layers = (target + beta * (index - depth) for index in range(len(layer_sizes)))
    return SparsityPlan(beta, tuple(min(max(sparsity, 0.0), 1.0) for sparsity in layers))
