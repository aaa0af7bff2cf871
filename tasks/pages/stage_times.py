"""Where the time of a search went: every stage that did work, as the manifests of its artifacts tell."""

from collections.abc import Iterator
from datetime import datetime

from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lanes.group_membership import GROUP
from layerwise.tasks.pages.report_tables import Row, Rows
from layerwise.tasks.results.search_result import FinishedSearch

READ = "weights read, bytes"  # a fact of stages that take the model through


def stages_table(store: ArtifactStore, search: FinishedSearch) -> Rows:
    """One row per stage that did work, in the order in which they were committed; lanes as the groups they ran in.

    ``start`` and ``end`` are seconds since the first one began, without the times in which none was at work: between
    two runs, say. A stage that was taken up again counts the seconds of all its attempts, and ends with the last.
    """
    artifacts = dict[str, tuple[str, Artifact]]()
    for role, artifact in search.stages.items():
        for name, worker in _workers(store, role, artifact):
            artifacts.setdefault(worker.key, (name, worker))
    rows = _without_pauses([_row(name, artifact) for name, artifact in artifacts.values()])
    return sorted(rows, key=lambda row: row["end"])  # to the second; of equal ones as the search names them


def _workers(store: ArtifactStore, role: str, artifact: Artifact) -> Iterator[tuple[str, Artifact]]:
    """The artifacts whose making was the work for this one: itself, or the groups of a lane."""
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
    """Times since the first start, without those between the end of all stages so far and the start of the next."""
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
