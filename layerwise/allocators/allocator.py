"""All allocators through one interface: each has a strength, and strength 0 gives the uniform plan."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from layerwise.allocators.alpha_pruning import AlphaPruning
from layerwise.allocators.atp import ATP, arithmetic
from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.depth_schedules import Erf, Power
from layerwise.allocators.dlp import DLP
from layerwise.allocators.dsa import DSA
from layerwise.allocators.erdos_renyi import ErdosRenyi, ErdosRenyiPlus
from layerwise.allocators.global_threshold import Global
from layerwise.allocators.lamp import LAMP
from layerwise.allocators.lsa import LSA
from layerwise.allocators.owl import OWL

# Allocators that need scores of the model's layers or linears.
Measuring = OWL | AlphaPruning | DSA | DLP | LSA | Global | LAMP
# Allocators that use the shapes of the linears alone.
ByShape = ErdosRenyi | ErdosRenyiPlus


@dataclass(frozen=True)
class Given:
    """Sparsities given by the user, one per decoder layer. Their weighted mean must be the overall sparsity."""

    layers: tuple[float, ...]
    method: Literal["given"] = "given"

    def __post_init__(self) -> None:
        for index, sparsity in enumerate(self.layers):
            if not 0 <= sparsity <= 1:
                raise ValueError(
                    f"the given sparsity of layer {index} is {sparsity:g}; it must lie in [0, 1]. Give the fraction "
                    "of weights to remove."
                )


Allocator = ATP | Measuring | ByShape | Erf | Power | Given

# Name of the field that holds the strength of an allocator.
STRENGTHS = {
    "owl": "spread",
    "alpha_pruning": "epsilon",
    "dsa": "spread",
    "dlp": "alpha",
    "lsa": "beta",
    "erf": "log_amplification",
    "power": "spread",
    "global": "strength",
    "lamp": "strength",
    "er": "strength",
    "er_plus": "strength",
}
TOLERANCE = 1e-6  # allowed difference between the mean of given sparsities and the overall sparsity


def strength_of(allocator: Allocator) -> float | None:
    """Return the strength of ``allocator``: 1 for given sparsities, None for ATP, whose strength (beta) is searched."""
    if isinstance(allocator, ATP):
        return None
    return 1.0 if isinstance(allocator, Given) else float(getattr(allocator, STRENGTHS[allocator.method]))


def parameter_name(allocator: Allocator) -> str:
    """Return the display name of the allocator's strength."""
    if isinstance(allocator, ATP):
        return "beta"
    return "given" if isinstance(allocator, Given) else f"{allocator.method} {STRENGTHS[allocator.method]}"


def spread_out(
    allocator: Allocator, strength: float, scores: Sequence[float], sizes: Sequence[int], target: float
) -> tuple[float, ...]:
    """Return the sparsity of every entry (a decoder layer or a linear); the weighted mean is ``target``.

    Args:
        strength: replaces the allocator's own strength; 0 gives the uniform plan.
        scores: one per entry, for an allocator that needs scores.
        sizes: number of weights of every entry.

    Raises:
        ValueError: the allocator does not accept the strength, or given sparsities do not have the mean ``target``.
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
            f"{len(layers)} sparsities were given, but the model has {len(sizes)} decoder layers. Give one for each."
        )
    mean = weighted_mean(layers, sizes)
    if abs(mean - target) > TOLERANCE:
        raise ValueError(
            f"the given sparsities have the weighted mean {mean:.6f}, but the overall sparsity is {target:g}. "
            f"Set the overall sparsity to {mean:.6f}, or change the given sparsities."
        )
    return layers
