"""Axes of figures: linear or logarithmic vertical axes, and the horizontal axis of the decoder layers."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair

# Ratio of the highest to the lowest value above which the axis is logarithmic.
WIDE_RANGE = 5.0
# Ratio above which only the powers of ten are labelled, because there is no room for 2 and 5 times these.
MANY_DECADES = 3000.0
# Up to FEW_LAYERS, every layer is labelled; up to MANY_LAYERS, every fifth one; above that, every tenth one.
FEW_LAYERS, MANY_LAYERS = 12, 80


def measure_axis(values: Sequence[float], title: str) -> dict[str, Any]:
    """Return the vertical axis of a quantity; logarithmic if its values are positive and span a wide range."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    if high > WIDE_RANGE * low and len(positive) == len(values):
        domain, ticks = [low / 1.25, high * 1.25], _decades(low / 1.25, high * 1.25)
        axis = altair.Axis(values=ticks, format="~g")
        return {"title": title, "axis": axis, "scale": altair.Scale(type="log", domain=domain)}
    return linear_axis(values, title)


def linear_axis(values: Sequence[float], title: str) -> dict[str, Any]:
    """Return a linear vertical axis with a margin around the values."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    domain = [low - margin, high + margin]
    scale = altair.Scale(domain=domain, nice=False, zero=False)
    return {"title": title, "axis": altair.Axis(tickCount=6), "scale": scale}


def layer_axis(layers: Iterable[int]) -> dict[str, Any]:
    """Return the horizontal axis of the decoder layers, with ticks at whole layers."""
    there = sorted(set(layers))
    step = 1 if len(there) <= FEW_LAYERS else 5 if len(there) <= MANY_LAYERS else 10
    ticks = [layer for layer in there if layer % step == 0]
    title = "decoder layer (0 is next to the input)"
    return {"title": title, "axis": altair.Axis(values=ticks, format="d", labelAngle=0)}


def _decades(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten between two numbers; only the powers for a large range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < MANY_DECADES * low else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]
