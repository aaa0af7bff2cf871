"""Betas to try in a search: multiples of a step, or a given number of betas spread over the legal range."""

import math
from collections.abc import Sequence

from layerwise.allocators.atp import largest_beta

# Step of the paper's grid (arXiv:2502.14770, section 4).
BETA_STEP = 0.002


def beta_grid(target: float, layer_sizes: Sequence[int], step: float = BETA_STEP) -> tuple[float, ...]:
    """Return the multiples of ``step`` in the legal range, 0 (uniform) first. The default step is the paper's."""
    largest = largest_beta(target, layer_sizes)
    count = beta_grid_size(target, layer_sizes, step)
    return tuple(min(round(step * index, 12), largest) for index in range(count))


def beta_grid_size(target: float, layer_sizes: Sequence[int], step: float) -> int:
    """Return the number of betas in ``beta_grid``, 0 included, without computing them."""
    if step <= 0:
        raise ValueError(f"the step of the beta grid is {step:g}; it must be positive, e.g. {BETA_STEP:g}.")
    # The upper bound may be a grid point (2 x .3 / 30 = .02) and come out slightly below it in floating point.
    return math.floor(min(largest_beta(target, layer_sizes) / step + 1e-9, 1e18)) + 1


def beta_spread(target: float, layer_sizes: Sequence[int], count: int) -> tuple[float, ...]:
    """Return 0 (uniform) and ``count`` betas spread evenly over the legal range, including its upper end.

    In a deep model the range is short, and a fixed step gives few betas (3 for 80 layers at 70 %).
    """
    if count < 1:
        raise ValueError(f"{count} betas were requested; request at least 1 in addition to beta 0.")
    largest = largest_beta(target, layer_sizes)
    if largest == 0:
        return (0.0,)
    return (0.0, *(largest * (index + 1) / count for index in range(count)))
