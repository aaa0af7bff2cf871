"""DSA: an allocation function found by a search over formulas (NeurIPS 2024, Discovering Sparsity Allocation).

The score of a layer is the variance of the logarithms of its Wanda scores (``abs(weight)`` times the norm of the input
feature). asin(atan(score)) is mapped to sparsities as in OWL. Scaling all Wanda scores does not change the result.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.allocators.budget import by_importance

# Default of the official command line.
SPREAD = 0.08
# Scores that are processed at a time, in float64: 32 MB.
PIECE = 1 << 22


@dataclass(frozen=True)
class DSA:
    """Increase sparsity with the variance of a layer's log-scores, up to a discontinuity (see ``dsa``)."""

    spread: float = SPREAD
    method: Literal["dsa"] = "dsa"

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 1:
            raise ValueError(
                f"the spread of DSA is {self.spread:g}; it must lie in [0, 1]. Give a sparsity, e.g. {SPREAD:g}."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every entry from its ``log_variance``."""
        return dsa(scores, sizes, target, self.spread)


def log_variance(scores: Iterable[Tensor]) -> float:
    """Return the unbiased variance of the natural logarithms of a layer's scores; the logarithm of 0 counts as 0.

    For Gaussian weights and equal input norms it is pi**2 / 8 = 1.234. Computed in float64: pieces of the layer are
    combined by their counts, means and sums of squared deviations (Chan, Golub and LeVeque 1983).

    Args:
        scores: Wanda scores of every linear of the layer (or of one linear), any shapes; read once.

    Raises:
        ValueError: there are fewer than two scores, or a score is infinite or NaN.
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
            f"the variance of {count} scores is undefined. Pass the scores of at least one linear."
        )
    if not math.isfinite(deviations):
        raise ValueError(
            f"the logarithms of the {count} scores of a layer have no finite variance. Look for infinite or NaN "
            "weights or activations."
        )
    return deviations / (count - 1)


def dsa(
    variances: Sequence[float], sizes: Sequence[int], target: float, spread: float = SPREAD
) -> tuple[float, ...]:
    """Compute sparsities from the variances of the log-scores, by the published function and with its discontinuity.

    asin(atan(v)) grows with v up to v = tan(1) = 1.557 and is undefined above. The official code replaces the NaN by 0,
    the smallest possible value. **A layer with a variance above 1.557 therefore gets the lowest sparsity**, although
    one just below 1.557 gets the highest. Real layers are close to this value: Gaussian weights alone give 1.234. If
    every variance is above 1.557, the plan is uniform.

    Args:
        variances: ``log_variance`` of every entry (a layer or a linear).
        sizes: number of weights of every entry.
        target: overall sparsity; the size-weighted mean equals it.
        spread: lambda of OWL's map; half the largest difference between two sparsities.

    Raises:
        ValueError: a variance is negative or not finite.
    """
    for index, variance in enumerate(variances):
        if not 0 <= variance < math.inf:
            raise ValueError(
                f"the variance of entry {index} is {variance}; it must be finite and 0 or more. Compute it with "
                "``log_variance``."
            )
    return by_importance([-_transformed(variance) for variance in variances], sizes, target, spread)


def _transformed(variance: float) -> float:
    angle = math.atan(variance)
    return math.asin(angle) if angle <= 1 else 0.0
