"""What Prefect's pages call the run of a stage: which model, at what sparsity, with which betas."""

from collections.abc import Sequence

from tasks.checkpoint import Checkpoint
from tasks.sources import HUB_ID

NAMED_BETAS = 3  # more do not fit into a line of Prefect's pages


def model_title(checkpoint: Checkpoint) -> str:
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


def betas_title(betas: Sequence[float]) -> str:
    """Some betas for people: the first ones, and how many there are."""
    named = ", ".join(f"{beta:.4g}" for beta in betas[:NAMED_BETAS])
    return f"beta {named}" + (f" ... ({len(betas)})" if len(betas) > NAMED_BETAS else "")
