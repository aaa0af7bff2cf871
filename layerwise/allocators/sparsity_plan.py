"""Sparsity plans: parts of a layer with a sparsity of their own, and the exact number of weights removed from every linear."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layerwise.models.expert_names import expert_linear

Granularity = Literal["layer", "linear", "expert"]

Unit = tuple[str | None, list[int]]  # name, and positions of its linears in the layer

OTHER_LINEARS = "other linears"  # of a layer with experts


@dataclass(frozen=True)
class SparsityPlan:
    """Sparsity of every decoder layer, first layer first, or of every prunable linear of every layer.

    Attributes:
        beta: strength of the allocator that made the plan (for ATP, the common difference); 0 is the uniform plan.
        layers: for each layer one sparsity, or one for each of its prunable linears.
        offset: sparsity of attention minus sparsity of the MLP.
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
        """Return the sparsity of every linear.

        Args:
            linear_sizes: number of weights of every prunable linear, by layer.

        Raises:
            ValueError: the plan has another number of layers or linears than ``linear_sizes``.
        """
        shares = tuple(
            layer if isinstance(layer, tuple) else (layer,) * len(sizes)
            for layer, sizes in zip(self.layers, linear_sizes, strict=False)
        )
        if len(self.layers) != len(linear_sizes) or [*map(len, shares)] != [*map(len, linear_sizes)]:
            raise ValueError(
                f"the plan is for {len(self.layers)} layers with {[*map(len, shares)]} linears, but the model has "
                f"{len(linear_sizes)} layers with {[*map(len, linear_sizes)]}. Build the plan for this model."
            )
        return shares

    def by_layer(self, linear_sizes: Sequence[Sequence[int]]) -> tuple[float, ...]:
        """Return the mean sparsity of every layer's weights; arguments and errors as for ``by_linear``."""
        return tuple(
            math.fsum(share * size for share, size in zip(shares, sizes, strict=True)) / max(sum(sizes), 1)
            for shares, sizes in zip(self.by_linear(linear_sizes), linear_sizes, strict=True)
        )


def removed_per_linear(
    plan: SparsityPlan, target: float, linear_sizes: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Count the weights to remove from every linear of every layer: exactly ``round(target * total)`` in all.

    Every linear gets the plan's sparsity to within one weight. Counts are rounded down first; the weights that are
    then missing go to the linears with the largest remainders, the earlier linear first if remainders are equal.

    Args:
        plan: a plan whose parameter-weighted mean is ``target``.
        target: overall sparsity.
        linear_sizes: number of weights of every linear, by layer.
    """
    ideal = [
        (layer, linear, sparsity * size)
        for layer, (shares, sizes) in enumerate(zip(plan.by_linear(linear_sizes), linear_sizes, strict=True))
        for linear, (sparsity, size) in enumerate(zip(shares, sizes, strict=True))
    ]
    # Sparsities are sums of floats: 0.3 * 10 may become 2.9999999999999996, which must not be rounded down to 2.
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


def units_of(linears: Sequence[str], granularity: Granularity) -> list[Unit]:
    """Return the parts of a layer: a name, and the positions of its linears.

    Args:
        linears: names of the linears of a layer.
        granularity: "layer": one part without a name. "linear": every linear. "expert": every expert, with all of its
            linears, and all other linears together.
    """
    if granularity == "layer":
        return [(None, list(range(len(linears))))]
    if granularity == "linear":
        return [(name, [position]) for position, name in enumerate(linears)]
    units: dict[str | None, list[int]] = {}
    for position, name in enumerate(linears):
        place = expert_linear(name)
        units.setdefault(OTHER_LINEARS if place is None else place.name, []).append(position)
    return list(units.items())
