"""DSA: the allocation function that a search over formulas found (NeurIPS 2024, Discovering Sparsity Allocation).

A layer's score is the variance of the logarithms of its Wanda scores (``abs(weight)`` times the norm of the input
feature); asin(atan(.)) of it is mapped to sparsities as in OWL. A common scale of the scores does not matter.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.allocators.budget import by_importance

# The official command line's default.
SPREAD = 0.08
# Scores that are looked at together, in float64: 32 MB.
PIECE = 1 << 22


@dataclass(frozen=True)
class DSA:
    """The more the scores of a layer vary on a logarithmic scale, the more it loses - up to a cliff, see ``dsa``."""

    spread: float = SPREAD
    method: Literal["dsa"] = "dsa"

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 1:
            raise ValueError(
                f"the spread of DSA is {self.spread:g}; it must lie in [0, 1], in units of sparsity, e.g. {SPREAD:g}."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Sparsity of every entry, given its ``log_variance``."""
        return dsa(scores, sizes, target, self.spread)


def log_variance(scores: Iterable[Tensor]) -> float:
    """Unbiased variance of the natural logarithms of one layer's scores; a score of exactly 0 counts as logarithm 0.

    For Gaussian weights and equal input norms it is pi**2 / 8 = 1.234. In float64, pieces of the layer being
    combined by their counts, means and sums of squared deviations (Chan, Golub and LeVeque 1983).

    Args:
        scores: Wanda scores of every linear of the layer (or of one linear), any shapes; gone through once.

    Raises:
        ValueError: fewer than two scores, or infinite or NaN ones.
    """
    count, mean, deviations = 0, 0.0, 0.0
    for tensor in scores:
        for piece in tensor.reshape(-1).split(PIECE):
            if piece.numel() == 0:
                continue
            magnitudes = piece.double().abs()
            logarithms = torch.where(magnitudes == 0, 1.0, magnitudes).log()
            piece_mean = logarithms.mean().item()
            total = count + piece.numel()
            deviations += (logarithms - piece_mean).square().sum().item()
            deviations += (piece_mean - mean) ** 2 * count * piece.numel() / total
            mean += (piece_mean - mean) * piece.numel() / total
            count = total
    if count < 2:
        raise ValueError(
            f"the variance of {count} scores is not defined. Pass the scores of at least one linear."
        )
    if not math.isfinite(deviations):
        raise ValueError(
            f"the logarithms of a layer's {count} scores have no variance. Look for infinite or NaN weights or "
            "activations."
        )
    return deviations / (count - 1)


def dsa(
    variances: Sequence[float], sizes: Sequence[int], target: float, spread: float = SPREAD
) -> tuple[float, ...]:
    """Sparsities from the variances of the log-scores: the published function, its trap included.

    asin(atan(v)) grows with v up to v = tan(1) = 1.557 and is undefined beyond; the official code replaces the NaN
    by 0, the least possible value. **A layer whose variance exceeds 1.557 therefore gets the least sparsity of
    all**, though just below it would get the most. Real layers lie near this cliff: Gaussian weights alone give
    1.234. If every variance is beyond, nothing tells the layers apart and the plan is uniform.

    Args:
        variances: ``log_variance`` of every entry, a layer or a linear.
        sizes: number of weights of every entry.
        target: overall sparsity, met exactly by the size-weighted mean.
        spread: lambda of the OWL map; sparsities differ by up to twice this.

    Raises:
        ValueError: a variance that is negative or not finite.
    """
    for index, variance in enumerate(variances):
        if not 0 <= variance < math.inf:
            raise ValueError(
                f"the variance of entry {index} is {variance}; DSA needs finite ones, 0 or more, as ``log_variance`` "
                "gives."
            )
    return by_importance([-_transformed(variance) for variance in variances], sizes, target, spread)


def _transformed(variance: float) -> float:
    angle = math.atan(variance)
    return math.asin(angle) if angle <= 1 else 0.0
