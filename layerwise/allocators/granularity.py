"""Granularity of an allocation: the parts of a decoder layer that get a sparsity of their own."""

from collections.abc import Sequence
from typing import Literal

from layerwise.models.expert_names import expert_linear

Granularity = Literal["layer", "linear", "expert"]

Unit = tuple[str | None, list[int]]  # name, and positions of its linears in the layer

OTHER_LINEARS = "other linears"  # of a layer with experts


def units_of(linears: Sequence[str], granularity: Granularity) -> list[Unit]:
    """Return the parts of a layer: a name, and the positions of its linears.

    Args:
        linears: names of the linears of a layer.
        granularity: "layer": one part without a name. "linear": every linear. "expert": every expert, with all of its
            linears, and all other linears together.
    """
    if granularity == "layer":
        return [(None, list(range(len(linears))))]
    if granularity == "linear":
        return [(name, [position]) for position, name in enumerate(linears)]
    units: dict[str | None, list[int]] = {}
    for position, name in enumerate(linears):
        place = expert_linear(name)
        units.setdefault(OTHER_LINEARS if place is None else place.name, []).append(position)
    return list(units.items())
