"""How much sparsity each decoder layer gets, for one overall target."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
