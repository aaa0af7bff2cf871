"""What Prefect's pages call the run of a stage: which model, at what sparsity, with which betas."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.sources.model_source import HUB_ID

if TYPE_CHECKING:  # takes seconds: too long for a command that only validates settings
    from layerwise.tasks.models.checkpoint import Checkpoint

NAMED = 3  # more do not fit into a line of Prefect's pages


def model_title(checkpoint: "Checkpoint") -> str:
    """What the checkpoint's model is called."""
    return title_of(str(checkpoint.artifact.facts["source"]))


def title_of(source: str) -> str:
    """The last part of a model's name; of a hub id without the commit, which has 40 digits."""
    if hub_id := HUB_ID.fullmatch(source):
        source = hub_id["repo"]
    return source.partition("?")[0].rstrip("/").rpartition("/")[2]


def windows_title(windows: tuple[int, int] | None) -> str:
    """What is said after the betas of lanes that run on some of the windows only."""
    return "" if windows is None else f", windows {windows[0]} to {windows[1] - 1}"


def points_title(points: Sequence[tuple[float, float]]) -> str:
    """Some plans for people, by beta and offset: the first ones, and how many there are."""
    with_offset = any(offset for _, offset in points)
    named = ", ".join(
        f"{beta:.4g} {offset:+.3g}" if with_offset else f"{beta:.4g}" for beta, offset in points[:NAMED]
    )
    return f"beta {named}" + (f" ... ({len(points)})" if len(points) > NAMED else "")


def plans_title(plans: Sequence[SparsityPlan]) -> str:
    """The same for plans."""
    return points_title([(plan.beta, plan.offset) for plan in plans])
