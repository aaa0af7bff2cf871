"""Depth schedules: sparsity as a function of depth alone, by the erf function or a power.

A steep straight line, as in ATP (``atp.arithmetic``, arXiv:2502.14770), leaves [0, 1]; the erf schedule never does. A
power schedule is curved, as the published sparsities of other methods are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from layerwise.allocators.budget import BISECTIONS, fitted, weighted_mean

# exp(700) is finite and exp(-700) is a normal float. erf is 1 far below exp(700) and linear near exp(-700).
LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Erf:
    """Minimize the error after the last layer if every layer multiplies its input error by ``exp(log_amplification)``.

    0 is the uniform plan. Negative values remove more from the first layers. About .04 is close to ATP's .01 per layer
    at 70 %.
    """

    log_amplification: float = 0.043
    method: Literal["erf"] = "erf"

    def __post_init__(self) -> None:
        _check_finite("log_amplification", self.log_amplification)

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every decoder layer, first layer first; ``scores`` is ignored."""
        return erf_schedule(target, self.log_amplification, sizes)


@dataclass(frozen=True)
class Power:
    """Increase sparsity by ``spread`` from the first to the last layer, as relative depth to the power ``exponent``.

    Exponent 1 is ATP's line; a smaller exponent is steep in the first layers and flat in the last. A negative
    ``spread`` decreases sparsity with depth. DLP's published sparsities are close to spread .3 with exponent .8 (7B
    models) and .5 (13B).
    """

    spread: float = 0.3
    exponent: float = 1.0
    method: Literal["power"] = "power"

    def __post_init__(self) -> None:
        _check_finite("spread", self.spread)
        if not 0 < self.exponent < math.inf:
            raise ValueError(
                f"the exponent of the power schedule is {self.exponent:g}; it must be positive and finite. Use 1 for a "
                "line, .5 for a curve that flattens towards the last layer."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every decoder layer, first layer first; ``scores`` is ignored."""
        return power_schedule(target, self.spread, self.exponent, sizes)


def erf_schedule(target: float, log_amplification: float, sizes: Sequence[int]) -> tuple[float, ...]:
    """Return ``s_i = erf(tau exp(-log_amplification (L - i) / 2))``, with tau such that the weighted mean is the target.

    This minimizes ``sum over i of c**(L - i) f(s_i)`` for a given overall sparsity. ``c = exp(log_amplification)``, and
    f(s) is the fraction of a Gaussian layer's energy in its smallest weights. ``f'(s) = t**2`` with
    ``s = erf(t / sqrt(2))``, so at the optimum t is smaller by a factor sqrt(c) for every layer that follows.

    Args:
        target: overall sparsity.
        log_amplification: logarithm of c, per layer; any sign.
        sizes: number of prunable weights of every layer, first layer first. All weights count as equally important.
    """
    if not sizes or log_amplification == 0 or target in (0, 1):
        return fitted([target] * len(sizes), sizes, target)
    # tau belongs to the middle layer, so that a steep schedule overflows at neither end.
    middle = (len(sizes) - 1) / 2
    steps = [log_amplification * (index - middle) / 2 for index in range(len(sizes))]

    def schedule(log_tau: float) -> list[float]:
        return [math.erf(math.exp(min(log_tau + step, LARGEST_EXPONENT))) for step in steps]

    reach = LARGEST_EXPONENT + max(map(abs, steps))
    too_little, enough = -reach, reach
    for _ in range(BISECTIONS):
        log_tau = (too_little + enough) / 2
        if weighted_mean(schedule(log_tau), sizes) < target:
            too_little = log_tau
        else:
            enough = log_tau
    return fitted(schedule(enough), sizes, target)


def power_schedule(target: float, spread: float, exponent: float, sizes: Sequence[int]) -> tuple[float, ...]:
    """Return ``s_i = target + spread (x_i**exponent - mean)``, with x from 0 at the first layer to 1 at the last.

    The mean is weighted by size. Values outside [0, 1] are clipped and the others shifted (``budget.fitted``).

    Args:
        target: overall sparsity.
        spread: sparsity of the last layer minus sparsity of the first, unless clipped; any sign.
        exponent: positive; 1 is a line.
        sizes: number of prunable weights of every layer, first layer first.
    """
    last = max(len(sizes) - 1, 1)
    bent = [(index / last) ** exponent for index in range(len(sizes))]
    mean = weighted_mean(bent, sizes)
    return fitted([target + spread * (value - mean) for value in bent], sizes, target)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite. Use 0 for the uniform plan.")
