"""Garbage of a store, for the command and the flow ``gc``: the artifacts to keep, and the lines that are printed."""

from collections.abc import Iterator, Sequence

from layerwise.display.byte_size import size
from layerwise.storage.artifact import Artifact
from layerwise.storage.upkeep.garbage_collection import KINDS, Collected, Collection, Garbage
from layerwise.tasks.results.roles import RESULTS

LISTED = 20  # files that are named in the output; the others are counted
# Names of the stages that people read or give to a search: pages, tables, the compressed model, speed, generated texts. And
# of the watcher's records: without them, it would start all its searches again.
MADE_OF_RESULTS = (
    "report",
    "compare",
    "theory",
    "theory_page",
    "compress",
    "distill",
    "zero_shot_table",
    "speed",
    "generate_calibration",
    "watch",
)


def keys_of_results(artifacts: Sequence[Artifact]) -> set[str]:
    """Return the keys of all finished searches, of their results, and of the artifacts made from these."""
    from layerwise.tasks.results.search_result import RESULT_STAGE  # imports Prefect

    keys = {artifact.key for artifact in artifacts if artifact.recipe.get("name") in MADE_OF_RESULTS}
    for artifact in artifacts:
        if artifact.recipe.get("name") == RESULT_STAGE:
            inputs = artifact.recipe["inputs"]
            assert isinstance(inputs, dict), "a recipe's inputs are keys by role"
            keys |= {artifact.key, *(inputs[role] for role in RESULTS if role in inputs)}
    return keys


def by_kind(garbage: Sequence[Garbage]) -> list[tuple[str, int, int]]:
    """Return name, count and bytes of each kind of garbage, and of all kinds together."""
    rows = []
    for kind in KINDS:
        sizes = [each.size for each in garbage if each.kind == kind]
        if sizes:
            rows.append((kind, len(sizes), sum(sizes)))
    return [*rows, ("all", len(garbage), sum(each.size for each in garbage))]


def lines_on_kept(collection: Collection) -> Iterator[str]:
    """Describe what is kept, and why, in one line each."""
    for process in collection.running:
        yield f"in use by {process}: newer files are kept"
    for key, problem in collection.damaged.items():
        yield f"damaged, kept: {key}: {problem}. Run layerwise verify."
    yield from _first(
        [f"not part of the store, kept: {path}" for path in collection.not_ours],
        "not part of the store, kept",
    )


def lines_on_failures(collected: Collected) -> Iterator[str]:
    """Describe what could not be deleted, and why, in one line each."""
    lines = [f"not deleted: {failure.path}: {failure.problem}" for failure in collected.failures]
    yield from _first(lines, "not deleted")


def deleted_in_short(collected: Collected) -> str:
    """Return how much was deleted, and how much could not be deleted."""
    freed = size(sum(each.size for each in collected.garbage)) or "0 B"
    failed = f"; {len(collected.failures)} could not be deleted" if collected.failures else ""
    return f"{len(collected.garbage)} deleted, {freed}{failed}"


def _first(lines: Sequence[str], what: str) -> Iterator[str]:
    yield from lines[:LISTED]
    if len(lines) > LISTED:
        yield f"{what}: {len(lines) - LISTED} more"
