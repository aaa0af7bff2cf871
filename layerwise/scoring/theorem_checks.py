"""What ATP's theorems say (arXiv:2502.14770, section 3), beside what was measured on a model.

The paper takes a decoder layer for one matrix W, and its error for E = ||W X - V Y||^2 (squared Frobenius norm), where
V is the pruned matrix, and X and Y are the inputs in the dense and in the pruned model. Here a layer is the whole
decoder layer, residual stream, norms and attention included, and every error is measured.
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
    """Theorem 3.1: of two prunings of a layer with the same input, the sparser one has the larger error.

    Attributes:
        layers: how many there are.
        steps: from one sparsity to the next, over all layers.
        falls: layer and step, from 0, of the steps with which its error does not rise.
        largest_fall: the largest relative one, 1 - after / before; 0 if there is none.
    """

    layers: int
    steps: int
    falls: tuple[tuple[int, int], ...]
    largest_fall: float

    @property
    def holds(self) -> bool:
        """Whether every error rises with every step."""
        return not self.falls


def rise_of(errors: Sequence[Sequence[float]]) -> Rise:
    """Whether the error of every layer of its own rises with every step of sparsity.

    Args:
        errors: by rising sparsity, then by layer.
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
    """What one layer makes of the error that arrives.

    Attributes:
        factor: what the squared arriving error becomes, over itself.
        relative_factor: the same with every error over the energy of the dense signal there: above 1, the error gains
            on the signal.
        cross: share of the error after the layer that is neither the layer's own nor the propagated one: twice the
            inner product of the two, which the proof of theorem 3.2 leaves out.
        exceeds: whether the error after the layer is larger than what the layer makes of the arriving one.
        grows: whether it is larger than the arriving one.
    """

    layer: int
    factor: float
    relative_factor: float
    cross: float
    exceeds: bool
    grows: bool


@dataclass(frozen=True)
class Propagation:
    """Theorem 3.2: E_{i+1} > s^2 E_i, where s is the smallest singular value of layer i+1.

    What can be measured of it is the step before the bound, E_{i+1} > what the layer makes of E_i, and that itself as a
    factor. For s the theorem has no number: of a matrix with more columns than rows, as an MLP's last one, it is 0.

    Attributes:
        layers: from the second one on, as no error arrives at the first.
    """

    layers: tuple[LayerPropagation, ...]

    @property
    def exceeding(self) -> int:
        """In so many layers the error afterwards is larger than what the layer makes of the arriving one."""
        return sum(layer.exceeds for layer in self.layers)

    @property
    def growing(self) -> int:
        """In so many layers it is larger than the arriving one."""
        return sum(layer.grows for layer in self.layers)

    @property
    def shrinking(self) -> tuple[int, ...]:
        """Layers that shrink the error that arrives."""
        return tuple(layer.layer for layer in self.layers if layer.factor < 1)

    @property
    def relatively_shrinking(self) -> tuple[int, ...]:
        """Layers that shrink it in comparison with the signal."""
        return tuple(layer.layer for layer in self.layers if layer.relative_factor < 1)

    @property
    def holds(self) -> bool:
        """Whether the step before the bound holds in every layer."""
        return self.exceeding == len(self.layers)

    def median(self, name: Literal["factor", "relative_factor", "cross"]) -> float:
        """Median over the layers."""
        return median(getattr(layer, name) for layer in self.layers)


def propagation_of(parts: Sequence[LocalErrors]) -> Propagation:
    """What every layer makes of the error that arrives, if any does.

    Args:
        parts: of one plan, by layer.
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
    """How a plan did.

    Attributes:
        total: sum of the layers' errors E_i: what theorem 3.5 is about.
        last: error E_L after the last layer.
        relative_total: sum of the errors, each over the energy of the layer's dense output.
        perplexity: of the losses.
        losses: by window, in nats.
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
    """Sum up one plan.

    Args:
        errors: accumulated error of every layer.
        energies: of every layer's dense output.
        losses: by window, in nats.
    """
    relative = math.fsum(error / energy for error, energy in zip(errors, energies, strict=True))
    return Outcome(order, math.fsum(errors), errors[-1], relative, perplexity(losses), tuple(losses))


@dataclass(frozen=True)
class Orders:
    """Theorem 3.5: of all orders of the same sparsities the ascending one has the least total error.

    Attributes:
        outcomes: of the orders, the ascending one first.
    """

    outcomes: tuple[Outcome, ...]

    def __post_init__(self) -> None:
        if len(self.outcomes) < 2:
            raise ValueError(
                f"{len(self.outcomes)} order is not enough for a comparison: give the ascending one and others."
            )

    @property
    def holds(self) -> bool:
        """Whether the ascending order has the least total error of those that were tried."""
        return self.below("total") == len(self.outcomes) - 1

    def below(self, measure: Measure) -> int:
        """How many of the other orders the ascending one is below."""
        ascending, *others = (getattr(outcome, measure) for outcome in self.outcomes)
        return sum(ascending < other for other in others)

    @property
    def runner_up(self) -> Outcome:
        """The one with the lowest perplexity, of the other orders."""
        return min(self.outcomes[1:], key=lambda outcome: outcome.perplexity)

    @property
    def gain(self) -> PairedDifference:
        """Of the ascending order's losses to those of the runner-up; negative if the ascending one is better."""
        return paired_difference(self.outcomes[0].losses, self.runner_up.losses)


@dataclass(frozen=True)
class Findings:
    """All that was found on one model.

    Attributes:
        levels: sparsities of the uniform plans, rising.
        target: the sparsity that theorems 3.2 and 3.5 are looked at with first.
        rise: theorem 3.1.
        propagations: theorem 3.2, by sparsity of the uniform plan.
        orders: theorem 3.5.
        uniform: the uniform plan at the orders' sparsity, beside them: the theorem says nothing of it.
    """

    levels: tuple[float, ...]
    target: float
    rise: Rise
    propagations: Mapping[float, Propagation]
    orders: Orders
    uniform: Outcome

    @property
    def propagation(self) -> Propagation:
        """Theorem 3.2 at the target."""
        return self.propagations[self.target]
