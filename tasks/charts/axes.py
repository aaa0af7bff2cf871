"""The vertical axis of a figure: linear, or by orders of magnitude where the values span some."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair

# Highest value over the lowest, from which on orders of magnitude are drawn.
WIDE_RANGE = 5.0
# From here on only the powers of ten are named: there is no room for twos and fives.
MANY_DECADES = 3000.0
FEW_LAYERS, MANY_LAYERS = 12, 80  # there is room for the numbers of so many, and for a fifth of so many


def measure_axis(values: Sequence[float], title: str) -> dict[str, Any]:
    """The vertical axis of a quantity whose zero says nothing; by orders of magnitude if its values span some."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    if high > WIDE_RANGE * low and len(positive) == len(values):
        domain, ticks = [low / 1.25, high * 1.25], _decades(low / 1.25, high * 1.25)
        axis = altair.Axis(values=ticks, format="~g")
        return {"title": title, "axis": axis, "scale": altair.Scale(type="log", domain=domain)}
    return linear_axis(values, title)


def linear_axis(values: Sequence[float], title: str) -> dict[str, Any]:
    """A vertical axis from a little below the lowest value to a little above the highest."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    domain = [low - margin, high + margin]
    scale = altair.Scale(domain=domain, nice=False, zero=False)
    return {"title": title, "axis": altair.Axis(tickCount=6), "scale": scale}


def layer_axis(layers: Iterable[int]) -> dict[str, Any]:
    """The horizontal axis of the decoder layers, whose ticks are layers: all of a few, else every fifth, or tenth."""
    there = sorted(set(layers))
    step = 1 if len(there) <= FEW_LAYERS else 5 if len(there) <= MANY_LAYERS else 10
    ticks = [layer for layer in there if layer % step == 0]
    title = "decoder layer (0 is nearest to the input)"
    return {"title": title, "axis": altair.Axis(values=ticks, format="d", labelAngle=0)}


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two numbers; powers alone if they are far apart."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < MANY_DECADES * low else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]
