"""Checks of ATP's theorems (arXiv:2502.14770, section 3) against measurements on a model.

In the paper, a decoder layer is one matrix W, and its error is E = ||W X - V Y||^2 (squared Frobenius norm), where V is
the pruned matrix, and X and Y are the inputs in the dense and in the pruned model. Here a layer is the whole decoder
layer, including residual stream, norms and attention, and every error is measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from layerwise.scoring.local_errors import LocalErrors
from layerwise.scoring.perplexity import PairedDifference, paired_difference, perplexity

Measure = Literal["total", "last", "relative_total", "perplexity"]


@dataclass(frozen=True)
class Rise:
    """Check of theorem 3.1: with the same input, a layer pruned to a higher sparsity has a larger error.

    Attributes:
        layers: number of layers.
        steps: number of steps from one sparsity to the next, summed over the layers.
        falls: (layer, step), both from 0, of every step at which the layer's error does not rise.
        largest_fall: largest relative decrease, 1 - after / before; 0 without a decrease.
    """

    layers: int
    steps: int
    falls: tuple[tuple[int, int], ...]
    largest_fall: float

    @property
    def holds(self) -> bool:
        """Return whether every error rises with every step."""
        return not self.falls


def rise_of(errors: Sequence[Sequence[float]]) -> Rise:
    """Check whether the local error of every layer rises with every step of sparsity.

    Args:
        errors: local errors by rising sparsity, then by layer.
    """
    falls = {
        (layer, step): 1 - after[layer] / before[layer] if before[layer] else 0.0
        for step, (before, after) in enumerate(zip(errors, errors[1:], strict=False))
        for layer in range(len(before))
        if after[layer] <= before[layer]
    }
    layers = len(errors[0])
    return Rise(layers, layers * (len(errors) - 1), tuple(sorted(falls)), max([0.0, *falls.values()]))


@dataclass(frozen=True)
class LayerPropagation:
    """Propagation of the arriving error through one layer. All errors are squared.

    Attributes:
        layer: index of the layer.
        factor: propagated error divided by arriving error.
        relative_factor: the same ratio with every error divided by the energy of the dense signal at its place; above
            1, the error grows faster than the signal.
        cross: fraction of the accumulated error that is neither local nor propagated: twice the inner product of the
            two, which the proof of theorem 3.2 omits.
        exceeds: whether the accumulated error is larger than the propagated error.
        grows: whether the accumulated error is larger than the arriving error.
    """

    layer: int
    factor: float
    relative_factor: float
    cross: float
    exceeds: bool
    grows: bool


@dataclass(frozen=True)
class Propagation:
    """Check of theorem 3.2: E_{i+1} > s^2 E_i, where s is the smallest singular value of layer i+1.

    The step before this bound can be measured: E_{i+1} is larger than the propagated error of layer i+1. The factor
    between arriving and propagated error is measured as well. The theorem gives no value of s; for a matrix with more
    columns than rows, such as the last one of an MLP, it is 0.

    Attributes:
        layers: all layers but the first, which has no arriving error.
    """

    layers: tuple[LayerPropagation, ...]

    @property
    def exceeding(self) -> int:
        """Return the number of layers whose accumulated error is larger than the propagated error."""
        return sum(layer.exceeds for layer in self.layers)

    @property
    def growing(self) -> int:
        """Return the number of layers whose accumulated error is larger than the arriving error."""
        return sum(layer.grows for layer in self.layers)

    @property
    def shrinking(self) -> tuple[int, ...]:
        """Return the layers whose propagated error is smaller than the arriving error."""
        return tuple(layer.layer for layer in self.layers if layer.factor < 1)

    @property
    def relatively_shrinking(self) -> tuple[int, ...]:
        """Return the layers that shrink the error relative to the dense signal."""
        return tuple(layer.layer for layer in self.layers if layer.relative_factor < 1)

    @property
    def holds(self) -> bool:
        """Return whether the step before the bound holds in every layer."""
        return self.exceeding == len(self.layers)

    def median(self, name: Literal["factor", "relative_factor", "cross"]) -> float:
        """Return the median of a field over the layers."""
        return median(getattr(layer, name) for layer in self.layers)


def propagation_of(parts: Sequence[LocalErrors]) -> Propagation:
    """Compute how every layer with an arriving error propagates it.

    Args:
        parts: local errors of one plan, by layer.
    """
    return Propagation(
        tuple(
            LayerPropagation(
                layer,
                after.propagated / after.arriving,
                (after.propagated / after.energy) / (after.arriving / before.energy),
                1 - (after.local + after.propagated) / after.accumulated,
                after.accumulated > after.propagated,
                after.accumulated > after.arriving,
            )
            for layer, (before, after) in enumerate(zip(parts, parts[1:], strict=False), 1)
            if after.arriving > 0 and after.accumulated > 0
        )
    )


@dataclass(frozen=True)
class Outcome:
    """Errors and perplexity of one plan.

    Attributes:
        order: order of the sparsities over the depth, see ``theorem_plans.TheoryPlan``.
        total: sum of the layers' errors E_i, the quantity of theorem 3.5.
        last: error E_L after the last layer.
        relative_total: sum of the errors, each divided by the energy of the layer's dense output.
        perplexity: perplexity of the losses.
        losses: loss of every window, in nats.
    """

    order: str
    total: float
    last: float
    relative_total: float
    perplexity: float
    losses: tuple[float, ...]


def outcome_of(
    order: str, errors: Sequence[float], energies: Sequence[float], losses: Sequence[float]
) -> Outcome:
    """Summarize one plan.

    Args:
        order: order of the sparsities over the depth.
        errors: accumulated error of every layer.
        energies: energy of every layer's dense output.
        losses: loss of every window, in nats.
    """
    relative = math.fsum(error / energy for error, energy in zip(errors, energies, strict=True))
    return Outcome(order, math.fsum(errors), errors[-1], relative, perplexity(losses), tuple(losses))


@dataclass(frozen=True)
class Orders:
    """Check of theorem 3.5: among all orders of the same sparsities, the ascending order has the lowest total error.

    Attributes:
        outcomes: outcome of every order, the ascending order first.
    """

    outcomes: tuple[Outcome, ...]

    def __post_init__(self) -> None:
        if len(self.outcomes) < 2:
            raise ValueError(
                f"the number of orders is {len(self.outcomes)}; it must be at least 2. Pass the ascending order and others."
            )

    @property
    def holds(self) -> bool:
        """Return whether the ascending order has the lowest total error of all tried orders."""
        return self.below("total") == len(self.outcomes) - 1

    def below(self, measure: Measure) -> int:
        """Return the number of other orders with a higher value of ``measure`` than the ascending order."""
        ascending, *others = (getattr(outcome, measure) for outcome in self.outcomes)
        return sum(ascending < other for other in others)

    @property
    def runner_up(self) -> Outcome:
        """Return the order with the lowest perplexity, apart from the ascending order."""
        return min(self.outcomes[1:], key=lambda outcome: outcome.perplexity)

    @property
    def gain(self) -> PairedDifference:
        """Return the difference in loss to the runner-up; negative if the ascending order is better."""
        return paired_difference(self.outcomes[0].losses, self.runner_up.losses)


@dataclass(frozen=True)
class Findings:
    """Results of all checks on one model.

    Attributes:
        levels: sparsities of the uniform plans, ascending.
        target: sparsity of the orders, and the main sparsity for theorem 3.2.
        rise: check of theorem 3.1.
        propagations: checks of theorem 3.2, by sparsity of the uniform plan.
        orders: check of theorem 3.5.
        uniform: outcome of the uniform plan at ``target``, for comparison; theorem 3.5 does not cover it.
    """

    levels: tuple[float, ...]
    target: float
    rise: Rise
    propagations: Mapping[float, Propagation]
    orders: Orders
    uniform: Outcome

    @property
    def propagation(self) -> Propagation:
        """Return the check of theorem 3.2 at the target."""
        return self.propagations[self.target]
