"""Betas that a search over ATP tries: the grid of the paper, or a number of them over the legal range."""

import math
from collections.abc import Sequence

from layerwise.allocators.atp import largest_beta

# Grid of the paper (ATP, section 4: the common difference is tried in steps of .002).
BETA_STEP = 0.002


def beta_grid(target: float, layer_sizes: Sequence[int], step: float = BETA_STEP) -> tuple[float, ...]:
    """Multiples of ``step`` in the legal range, 0 (uniform) first: the grid of the paper with the default step."""
    largest = largest_beta(target, layer_sizes)
    count = beta_grid_size(target, layer_sizes, step)
    return tuple(min(round(step * index, 12), largest) for index in range(count))


def beta_grid_size(target: float, layer_sizes: Sequence[int], step: float) -> int:
    """Number of betas of ``beta_grid``, 0 among them; computes none of them."""
    if step <= 0:
        raise ValueError(f"the step of the beta grid is {step:g}; it must be positive, e.g. {BETA_STEP:g}.")
    # The paper's own bounds fall on grid points (2 x .3 / 30 = .02), which floating point may miss by one
    # unit.
    return math.floor(min(largest_beta(target, layer_sizes) / step + 1e-9, 1e18)) + 1


def beta_spread(target: float, layer_sizes: Sequence[int], count: int) -> tuple[float, ...]:
    """0 (uniform) and ``count`` betas spread evenly over the legal range, its upper end included.

    Deep models have a short range that a fixed step covers coarsely (3 points for 80 layers at 70 %); a
    count does not.
    """
    if count < 1:
        raise ValueError(f"{count} betas were asked for; at least 1 is needed beside beta 0.")
    largest = largest_beta(target, layer_sizes)
    if largest == 0:
        return (0.0,)
    return (0.0, *(largest * (index + 1) / count for index in range(count)))
