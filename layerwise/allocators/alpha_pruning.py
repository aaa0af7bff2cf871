"""AlphaPruning: layers whose weights have a heavier-tailed spectrum lose less (arXiv:2410.10912).

Needs no calibration text. The spectrum of a linear is that of its squared singular values; a small exponent of their
power-law tail means a heavy tail, which well trained layers have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.allocators.budget import fitted, min_max, weighted_mean

# Published for LLaMA-2-7B with Wanda; .5 with magnitude, .2 with SparseGPT.
EPSILON = 0.3
# Bins of the histogram of log10(eigenvalue) whose fullest one is the peak of the spectrum, as published.
BINS = 100
# A tail may begin at most this many times above the peak, as published.
BEYOND_PEAK = 1.5


@dataclass(frozen=True)
class AlphaPruning:
    """Sparsity rises linearly with the exponent, from ``1 - epsilon`` to ``1 + epsilon`` times a common factor."""

    epsilon: float = EPSILON
    method: Literal["alpha_pruning"] = "alpha_pruning"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise ValueError(
                f"epsilon of AlphaPruning is {self.epsilon:g}; it must lie in [0, 1], as a share of the overall "
                f"sparsity, e.g. {EPSILON:g}."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Sparsity of every entry, given its ``tail_exponent`` (of a layer: the plain mean over its linears)."""
        return alpha_pruning(scores, sizes, target, self.epsilon)


def tail_exponent(weight: Tensor, tail: Literal["peak", "median"] = "peak") -> float:
    """Exponent alpha of the power law that the largest squared singular values follow (Hill's estimator).

    For a tail of n eigenvalues from ``lambda_min`` up it is ``1 + n / sum(ln(eigenvalue / lambda_min))``. The tail is

    * "peak": of all those that begin at an eigenvalue up to 1.5 times the peak of the spectrum (left edge of the
      fullest of 100 bins of log10), the one with the least Kolmogorov-Smirnov distance to its own law. The
      official code means to exclude beginnings below .95 times the peak as well, but compares the eigenvalues with
      the logarithm of that bound, which for weights of usual size excludes none; none is excluded here.
    * "median": the upper half of the spectrum.

    Eigenvalues are computed in float64; those that are zero to its precision are left out. A factor on the weight
    does not matter. Takes the time of an eigendecomposition of the smaller side.

    Args:
        weight: shape ``(out_features, in_features)``; left unchanged.
        tail: how the smallest eigenvalue of the tail is chosen.

    Raises:
        ValueError: weights that are not finite, or with fewer than two different eigenvalues; another tail.
    """
    eigenvalues = _spectrum(weight)
    if tail == "median":
        return _exponent(eigenvalues.log(), len(eigenvalues) // 2)
    if tail == "peak":
        return _exponent_of_best_tail(eigenvalues)
    raise ValueError(f"AlphaPruning knows no tail {tail!r}; it is 'peak' or 'median'.")


def alpha_pruning(
    exponents: Sequence[float], sizes: Sequence[int], target: float, epsilon: float = EPSILON
) -> tuple[float, ...]:
    """Sparsities from the exponents: the smaller, the heavier the tail, the less is removed.

    Ratios run linearly from ``1 - epsilon`` at the smallest exponent to ``1 + epsilon`` at the largest one and are
    multiplied by the factor that makes their size-weighted mean the target. What then exceeds 1, which the paper lets
    pass, is clipped and the rest shifted (``budget.fitted``).

    Args:
        exponents: one per entry, a layer or a linear.
        sizes: number of weights of every entry.
        target: overall sparsity, met exactly by the size-weighted mean.
        epsilon: half the range of the ratios.
    """
    ratios = [1 + epsilon * (2 * value - 1) for value in min_max(exponents)]
    if len(set(ratios)) == 1:
        return fitted(ratios, sizes, target)
    factor = target / weighted_mean(ratios, sizes)
    return fitted([factor * ratio for ratio in ratios], sizes, target)


def _spectrum(weight: Tensor) -> Tensor:
    """Squared singular values that are not zero, ascending, float64."""
    if weight.dim() != 2 or not bool(weight.isfinite().all()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has no spectrum: AlphaPruning needs a matrix of finite numbers."
        )
    exact = weight.double()
    smaller_gram = exact @ exact.T if weight.shape[0] <= weight.shape[1] else exact.T @ exact
    eigenvalues = torch.linalg.eigvalsh(smaller_gram)
    rounding = len(eigenvalues) * torch.finfo(torch.float64).eps
    eigenvalues = eigenvalues[eigenvalues > eigenvalues.max() * rounding] if len(eigenvalues) else eigenvalues
    if len(eigenvalues) < 2 or eigenvalues[0] == eigenvalues[-1]:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has {len(eigenvalues)} eigenvalues that are not zero; the "
            "tail of a spectrum needs two different ones. Use another allocator."
        )
    return eigenvalues


def _exponent(logarithms: Tensor, first: int) -> float:
    """Hill's estimate for the tail that begins at index ``first`` of the ascending logarithms."""
    excess = (logarithms[first:] - logarithms[first]).sum().item()
    if excess == 0:
        raise ValueError(
            f"the largest {len(logarithms) - first} eigenvalues of a weight are all equal: no power law has that "
            "tail. Use another allocator."
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
    """Largest gap between a tail's distribution function and the power law's, over ``ln(eigenvalue / lambda_min)``."""
    law = 1 - torch.exp(excess * (1 - exponent))
    steps = torch.arange(len(excess), dtype=torch.float64, device=excess.device) / len(excess)
    return (law - steps).abs().max().item()
