"""Time and memory of the stages of a search, read from the manifests of its artifacts."""

from collections.abc import Iterator
from datetime import datetime

from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lanes.group_membership import GROUP
from layerwise.tasks.results.report_tables import Row, Rows
from layerwise.tasks.results.search_result import FinishedSearch

READ = "weights read, bytes"  # fact of the stages that read the model


def stages_table(store: ArtifactStore, search: FinishedSearch) -> Rows:
    """Return a row for every stage that did work, in the order of their commits. Lanes appear as their lane groups.

    ``start`` and ``end`` are seconds since the start of the first stage, without periods in which no stage ran, for
    example between two runs. A resumed stage counts the seconds of all its attempts, and ends with the last one.
    """
    artifacts = dict[str, tuple[str, Artifact]]()
    for role, artifact in search.stages.items():
        for name, worker in _workers(store, role, artifact):
            artifacts.setdefault(worker.key, (name, worker))
    rows = _without_pauses([_row(name, artifact) for name, artifact in artifacts.values()])
    # Times in seconds; equal ones keep the order of the search.
    return sorted(rows, key=lambda row: row["end"])


def _workers(store: ArtifactStore, role: str, artifact: Artifact) -> Iterator[tuple[str, Artifact]]:
    """Yield the artifacts whose building was the work for this one: itself, or the groups of a lane."""
    inputs = artifact.recipe["inputs"]
    assert isinstance(inputs, dict), "a recipe's inputs are keys by role"
    if artifact.recipe["name"] == "lane_rounds":
        for key in inputs.values():
            yield from _workers(store, role, store.get(key))
    elif GROUP in artifact.made:
        group = store.get(str(artifact.made[GROUP]))
        members = group.recipe["inputs"]
        assert isinstance(members, dict), "a group's inputs are its lanes"
        yield f"{len(members)} {'lane' if len(members) == 1 else 'lanes'}", group
    else:
        yield role, artifact


def _row(name: str, artifact: Artifact) -> Row:
    end = datetime.fromisoformat(str(artifact.made["at"])).timestamp()
    seconds = float(str(artifact.made["seconds"]))
    return {
        "stage": name,
        "key": artifact.key,
        "content": artifact.content,
        "committed": str(artifact.made["at"]),
        "seconds": seconds,
        "start": end - seconds,
        "end": end,
        "peak_memory": artifact.made.get("peak_memory"),
        "weights_read": artifact.facts.get(READ),
        "bytes": artifact.size,
    }


def _without_pauses(rows: Rows) -> Rows:
    """Make times relative to the first start, and remove the pauses between the stages."""
    by_start = sorted(rows, key=lambda row: row["start"])
    pauses = reached = by_start[0]["start"]
    before = dict[str, float]()
    for row in by_start:
        pauses += max(row["start"] - reached, 0.0)
        reached = max(reached, row["end"])
        before[row["key"]] = pauses
    return [
        {**row, "start": row["start"] - before[row["key"]], "end": row["end"] - before[row["key"]]}
        for row in rows
    ]
