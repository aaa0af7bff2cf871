"""All allocators, as one family: each spreads the budget by a strength, and at strength 0 all of them are uniform."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from layerwise.allocators.alpha_pruning import AlphaPruning
from layerwise.allocators.atp import ATP, arithmetic
from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.depth_schedules import Erf, Power
from layerwise.allocators.dlp import DLP
from layerwise.allocators.dsa import DSA
from layerwise.allocators.lsa import LSA
from layerwise.allocators.owl import OWL

Measuring = OWL | AlphaPruning | DSA | DLP | LSA  # by scores of the model's layers or linears


@dataclass(frozen=True)
class Given:
    """Sparsities of the user's own, one for each decoder layer; their weighted mean has to be the overall target."""

    layers: tuple[float, ...]
    method: Literal["given"] = "given"

    def __post_init__(self) -> None:
        for index, sparsity in enumerate(self.layers):
            if not 0 <= sparsity <= 1:
                raise ValueError(
                    f"the given sparsity of layer {index} is {sparsity:g}; it must lie in [0, 1], as the "
                    "fraction removed."
                )


Allocator = ATP | Measuring | Erf | Power | Given

# The field that says how strongly an allocator tells the layers apart.
STRENGTHS = {
    "owl": "spread",
    "alpha_pruning": "epsilon",
    "dsa": "spread",
    "dlp": "alpha",
    "lsa": "beta",
    "erf": "log_amplification",
    "power": "spread",
}
TOLERANCE = 1e-6  # of the mean of sparsities that a user has written down


def strength_of(allocator: Allocator) -> float | None:
    """How strongly this allocator tells the layers apart; None for ATP, whose strength is searched for.

    The strength of given sparsities is 1.
    """
    if isinstance(allocator, ATP):
        return None
    return 1.0 if isinstance(allocator, Given) else float(getattr(allocator, STRENGTHS[allocator.method]))


def parameter_name(allocator: Allocator) -> str:
    """What the strength of this allocator is called."""
    if isinstance(allocator, ATP):
        return "beta"
    return "given" if isinstance(allocator, Given) else f"{allocator.method} {STRENGTHS[allocator.method]}"


def spread_out(
    allocator: Allocator, strength: float, scores: Sequence[float], sizes: Sequence[int], target: float
) -> tuple[float, ...]:
    """Sparsity of every entry, a decoder layer or a linear, whose weighted mean is ``target``.

    Args:
        strength: takes the place of the allocator's own; 0 is the uniform plan.
        scores: of the entries, for an allocator that measures them.
        sizes: number of weights of every entry.

    Raises:
        ValueError: a strength that the allocator does not take, or given sparsities that miss the target.
    """
    if strength == 0:
        return (target,) * len(sizes)
    if isinstance(allocator, ATP):
        layers = arithmetic(target, strength, sizes).layers
        return tuple(sparsity for sparsity in layers if isinstance(sparsity, float))
    if isinstance(allocator, Given):
        return _given(allocator.layers, sizes, target)
    changed: dict[str, Any] = {STRENGTHS[allocator.method]: strength}
    return replace(allocator, **changed).allocate(scores, sizes, target)


def _given(layers: tuple[float, ...], sizes: Sequence[int], target: float) -> tuple[float, ...]:
    if len(layers) != len(sizes):
        raise ValueError(
            f"{len(layers)} sparsities are given, and the model has {len(sizes)} decoder layers. Give one for each."
        )
    mean = weighted_mean(layers, sizes)
    if abs(mean - target) > TOLERANCE:
        raise ValueError(
            f"the given sparsities have the weighted mean {mean:.6f}, and the overall sparsity is {target:g}. "
            f"Set the overall sparsity to {mean:.6f}, or change the list."
        )
    return layers
