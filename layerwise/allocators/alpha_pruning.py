"""AlphaPruning: remove less from layers whose weights have a heavier-tailed spectrum (arXiv:2410.10912).

Needs no calibration text. The spectrum of a linear consists of its squared singular values. A small exponent of the
power-law tail means a heavy tail, as in well-trained layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.allocators.budget import fitted, min_max, weighted_mean

# Published value for LLaMA-2-7B with Wanda; .5 with magnitude, .2 with SparseGPT.
EPSILON = 0.3
# Number of bins in the histogram of log10(eigenvalue); the fullest bin is the peak of the spectrum, as published.
BINS = 100
# Largest start of the tail, as a multiple of the peak, as published.
BEYOND_PEAK = 1.5


@dataclass(frozen=True)
class AlphaPruning:
    """Increase sparsity linearly with the exponent, from ``1 - epsilon`` to ``1 + epsilon`` times a common factor."""

    epsilon: float = EPSILON
    method: Literal["alpha_pruning"] = "alpha_pruning"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise ValueError(
                f"epsilon of AlphaPruning is {self.epsilon:g}; it must lie in [0, 1]. Give a fraction of the overall "
                f"sparsity, e.g. {EPSILON:g}."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every entry from its ``tail_exponent`` (for a layer, the mean over its linears)."""
        return alpha_pruning(scores, sizes, target, self.epsilon)


def tail_exponent(weight: Tensor) -> float:
    """Estimate the exponent alpha of the power law of the largest squared singular values (Hill's estimator).

    For a tail of n eigenvalues, ``lambda_min`` and larger, it is ``1 + n / sum(ln(eigenvalue / lambda_min))``. The tail
    starts at an eigenvalue of at most 1.5 times the peak of the spectrum (the left edge of the fullest of 100 bins of
    log10). Among these tails, the one with the smallest Kolmogorov-Smirnov distance to its own power law is used. The
    official code intends to exclude starts below .95 times the peak as well, but compares the eigenvalues with the
    logarithm of that bound, which excludes nothing for weights of usual size. Nothing is excluded here.

    Eigenvalues are computed in float64, and those that are zero at this precision are ignored. Scaling the weight
    does not change the result. The cost is an eigendecomposition of the smaller side.

    Args:
        weight: shape ``(out_features, in_features)``; left unchanged.

    Raises:
        ValueError: ``weight`` is not finite, or has fewer than two different eigenvalues.
    """
    return _exponent_of_best_tail(_spectrum(weight))


def alpha_pruning(
    exponents: Sequence[float], sizes: Sequence[int], target: float, epsilon: float = EPSILON
) -> tuple[float, ...]:
    """Compute sparsities from tail exponents: a smaller exponent (heavier tail) gives a lower sparsity.

    Ratios increase linearly from ``1 - epsilon`` at the smallest exponent to ``1 + epsilon`` at the largest. They are
    multiplied by the factor that makes their size-weighted mean the target. Values above 1, which the paper allows,
    are clipped, and the others are shifted (``budget.fitted``).

    Args:
        exponents: one per entry (a layer or a linear).
        sizes: number of weights of every entry.
        target: overall sparsity; the size-weighted mean equals it.
        epsilon: half the range of the ratios.
    """
    ratios = [1 + epsilon * (2 * value - 1) for value in min_max(exponents)]
    if len(set(ratios)) == 1:
        return fitted(ratios, sizes, target)
    factor = target / weighted_mean(ratios, sizes)
    return fitted([factor * ratio for ratio in ratios], sizes, target)


def _spectrum(weight: Tensor) -> Tensor:
    """Return the nonzero squared singular values, ascending, float64."""
    if weight.dim() != 2 or not bool(weight.isfinite().all()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has no spectrum. AlphaPruning needs a matrix of finite numbers."
        )
    exact = weight.double()
    smaller_gram = exact @ exact.T if weight.shape[0] <= weight.shape[1] else exact.T @ exact
    eigenvalues = torch.linalg.eigvalsh(smaller_gram)
    rounding = len(eigenvalues) * torch.finfo(torch.float64).eps
    eigenvalues = eigenvalues[eigenvalues > eigenvalues.max() * rounding] if len(eigenvalues) else eigenvalues
    if len(eigenvalues) < 2 or eigenvalues[0] == eigenvalues[-1]:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has {len(eigenvalues)} nonzero eigenvalues; AlphaPruning needs "
            "two different ones. Use another allocator."
        )
    return eigenvalues


def _exponent(logarithms: Tensor, first: int) -> float:
    """Return Hill's estimate for the tail that starts at index ``first`` of the ascending logarithms."""
    excess = (logarithms[first:] - logarithms[first]).sum().item()
    if excess == 0:
        raise ValueError(
            f"the largest {len(logarithms) - first} eigenvalues of a weight are all equal, so a power law cannot be "
            "fitted. Use another allocator."
        )
    return 1 + (len(logarithms) - first) / excess


def _exponent_of_best_tail(eigenvalues: Tensor) -> float:
    logarithms = eigenvalues.log()
    base10 = eigenvalues.log10()
    lowest, highest = base10[0].item(), base10[-1].item()
    fullest = int(torch.histc(base10, BINS, lowest, highest).argmax())
    peak = 10 ** (lowest + fullest * (highest - lowest) / BINS)
    beginnings = (eigenvalues <= BEYOND_PEAK * peak) & (eigenvalues < eigenvalues[-1])

    def misfit(first: int) -> float:
        return _distance(logarithms[first:] - logarithms[first], _exponent(logarithms, first))

    return _exponent(logarithms, min(range(int(beginnings.sum())), key=misfit))


def _distance(excess: Tensor, exponent: float) -> float:
    """Return the largest difference between the distribution functions of a tail and of its power law.

    Args:
        excess: ``ln(eigenvalue / lambda_min)`` of the tail, ascending.
    """
    law = 1 - torch.exp(excess * (1 - exponent))
    steps = torch.arange(len(excess), dtype=torch.float64, device=excess.device) / len(excess)
    return (law - steps).abs().max().item()
