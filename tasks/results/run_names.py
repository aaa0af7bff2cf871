"""Names of task and flow runs in Prefect: model, sparsity and betas."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.tasks.sources.model_source import HUB_ID

if TYPE_CHECKING:  # takes seconds: too long for a command that only validates settings
    from layerwise.tasks.models.checkpoint import Checkpoint

NAMED = 3  # betas; more do not fit into a line of Prefect's pages


def model_title(checkpoint: "Checkpoint") -> str:
    """Return the short name of the checkpoint's model."""
    return title_of(str(checkpoint.artifact.facts["source"]))


def title_of(source: str) -> str:
    """Return the last part of a model's name; a hub id loses its commit of 40 digits."""
    if hub_id := HUB_ID.fullmatch(source):
        source = hub_id["repo"]
    return source.partition("?")[0].rstrip("/").rpartition("/")[2]


def windows_title(windows: tuple[int, int] | None) -> str:
    """Return the suffix that names the windows of lanes that run on a part of them; "" for all windows."""
    return "" if windows is None else f", windows {windows[0]} to {windows[1] - 1}"


def points_title(points: Sequence[tuple[float, float]]) -> str:
    """Name the first plans by beta and offset, followed by the number of plans if there are more."""
    with_offset = any(offset for _, offset in points)
    named = ", ".join(
        f"{beta:.4g} {offset:+.3g}" if with_offset else f"{beta:.4g}" for beta, offset in points[:NAMED]
    )
    return f"beta {named}" + (f" ... ({len(points)})" if len(points) > NAMED else "")


def plans_title(plans: Sequence[SparsityPlan]) -> str:
    """Name plans as ``points_title`` does."""
    return points_title([(plan.beta, plan.offset) for plan in plans])
