"""How much sparsity each decoder layer gets, for one overall target."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Grid of the paper (ATP, section 4: the common difference is tried in steps of .002).
BETA_STEP = 0.002


@dataclass(frozen=True)
class SparsityPlan:
    """Sparsity of every decoder layer, first layer first, or of every prunable linear of every layer.

    Attributes:
        beta: what the plan came from: ATP's common difference, or how strongly another allocator tells the layers
            apart; 0 is the uniform plan.
        layers: one number for each layer, or one for each of its prunable linears.
        offset: how much more of attention's weights than of the MLP's is removed.
    """

    beta: float
    layers: tuple[float | tuple[float, ...], ...]
    offset: float = 0.0

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            for sparsity in layer if isinstance(layer, tuple) else (layer,):
                if not 0 <= sparsity <= 1:
                    raise ValueError(
                        f"layer {index} would get sparsity {sparsity:.4f}, outside [0, 1] (beta {self.beta:g}). "
                        "Lower beta or move the overall target towards one half."
                    )

    def by_linear(self, linear_sizes: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
        """Sparsity of every linear.

        Args:
            linear_sizes: number of weights of every prunable linear, by layer.

        Raises:
            ValueError: the plan was made for other layers or linears.
        """
        shares = tuple(
            layer if isinstance(layer, tuple) else (layer,) * len(sizes)
            for layer, sizes in zip(self.layers, linear_sizes, strict=False)
        )
        if len(self.layers) != len(linear_sizes) or [*map(len, shares)] != [*map(len, linear_sizes)]:
            raise ValueError(
                f"a plan for {len(self.layers)} layers with {[*map(len, shares)]} linears does not go with the model's "
                f"{len(linear_sizes)} layers with {[*map(len, linear_sizes)]}. Build the plan for this model."
            )
        return shares

    def by_layer(self, linear_sizes: Sequence[Sequence[int]]) -> tuple[float, ...]:
        """Mean sparsity of every layer's weights; arguments and errors as for ``by_linear``."""
        return tuple(
            math.fsum(share * size for share, size in zip(shares, sizes, strict=True)) / max(sum(sizes), 1)
            for shares, sizes in zip(self.by_linear(linear_sizes), linear_sizes, strict=True)
        )


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


def beta_grid(target: float, layer_sizes: Sequence[int], step: float = BETA_STEP) -> tuple[float, ...]:
    """Multiples of ``step`` in the legal range, 0 (uniform) first: the grid of the paper with the default step."""
    largest = largest_beta(target, layer_sizes)
    count = beta_grid_size(target, layer_sizes, step)
    return tuple(min(round(step * index, 12), largest) for index in range(count))


def beta_grid_size(target: float, layer_sizes: Sequence[int], step: float) -> int:
    """Number of betas of ``beta_grid``, 0 among them; computes none of them."""
    if step <= 0:
        raise ValueError(f"the step of the beta grid is {step:g}; it must be positive, e.g. {BETA_STEP:g}.")
    # The paper's own bounds fall on grid points (2 x .3 / 30 = .02), which floating point may miss by one
    # unit.
    return math.floor(min(largest_beta(target, layer_sizes) / step + 1e-9, 1e18)) + 1


def beta_spread(target: float, layer_sizes: Sequence[int], count: int) -> tuple[float, ...]:
    """0 (uniform) and ``count`` betas spread evenly over the legal range, its upper end included.

    Deep models have a short range that a fixed step covers coarsely (3 points for 80 layers at 70 %); a
    count does not.
    """
    if count < 1:
        raise ValueError(f"{count} betas were asked for; at least 1 is needed beside beta 0.")
    largest = largest_beta(target, layer_sizes)
    if largest == 0:
        return (0.0,)
    return (0.0, *(largest * (index + 1) / count for index in range(count)))


def removed_per_linear(
    plan: SparsityPlan, target: float, linear_sizes: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """How many weights of every linear of every layer are removed: exactly ``round(target * total)`` in all.

    Every linear gets its plan's sparsity to within one weight; the units that rounding down leaves over go
    to the largest remainders, the earlier linear first among equal ones.

    Args:
        plan: its parameter-weighted mean is ``target``.
        target: overall sparsity.
        linear_sizes: number of weights of every linear, by layer.
    """
    ideal = [
        (layer, linear, sparsity * size)
        for layer, (shares, sizes) in enumerate(zip(plan.by_linear(linear_sizes), linear_sizes, strict=True))
        for linear, (sparsity, size) in enumerate(zip(shares, sizes, strict=True))
    ]
    # Sparsities are sums of floats: 0.3 * 10 may come out as 2.9999999999999996 and must not be cut to 2.
    counts = [math.floor(amount + 1e-6) for _, _, amount in ideal]
    missing = round(target * sum(map(sum, linear_sizes))) - sum(counts)
    if not 0 <= missing <= len(counts):
        raise ValueError(
            f"the plan's parameter-weighted mean is not {target:g}: {missing} weights are left over for "
            f"{len(counts)} linears. Build the plan for the sizes of this model."
        )
    by_remainder = sorted(range(len(ideal)), key=lambda index: (counts[index] - ideal[index][2], index))
    for index in by_remainder[:missing]:
        counts[index] += 1
    removed: list[list[int]] = [[0] * len(sizes) for sizes in linear_sizes]
    for (layer, linear, _), count in zip(ideal, counts, strict=True):
        removed[layer][linear] = count
    return tuple(map(tuple, removed))
