"""Names of the linears of experts in a decoder layer, e.g. ``mlp.experts.3.up_proj``."""

import re
from dataclasses import dataclass
from functools import cache

EXPERT_LINEAR = re.compile(r"(?P<pool>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<linear>.+)")


@dataclass(frozen=True)
class ExpertLinear:
    """Place of a linear among the experts of a layer.

    Attributes:
        pool: name of the experts' module in the layer, e.g. ``mlp.experts``.
        expert: number of the expert.
        linear: name of the linear in the expert, e.g. ``up_proj``.
    """

    pool: str
    expert: int
    linear: str

    @property
    def kind(self) -> str:
        """Name that the same linear of all experts shares, e.g. ``mlp.experts.*.up_proj``."""
        return f"{self.pool}.*.{self.linear}"

    @property
    def name(self) -> str:
        """Name of the expert in the layer, e.g. ``mlp.experts.3``."""
        return f"{self.pool}.{self.expert}"


@cache
def expert_linear(name: str) -> ExpertLinear | None:
    """Return the place of a linear among the experts of its layer; None for any other linear.

    Args:
        name: name of the linear in the layer.
    """
    match = EXPERT_LINEAR.fullmatch(name)
    return None if match is None else ExpertLinear(match["pool"], int(match["expert"]), match["linear"])


def kind_of(name: str) -> str:
    """Return the name of a linear in its layer, without the number of the expert."""
    place = expert_linear(name)
    return name if place is None else place.kind
