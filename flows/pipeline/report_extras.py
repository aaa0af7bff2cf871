"""What was measured of a finished search after its end, found in the store: for its report."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from layerwise.sparse.speed import SpeedTable
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lm_eval_tasks.comparison_table import TABLE_FILE, TABLE_STAGE
from layerwise.tasks.pages.report_extras import Extras, Sizes, ZeroShotRow
from layerwise.tasks.results.search_result import FinishedSearch
from layerwise.tasks.results.speed_table import SPEED_STAGE, read_speed
from layerwise.tasks.results.theory_findings import THEORY_STAGE


def extras_of(store: ArtifactStore, search: FinishedSearch, table: Artifact | None = None) -> Extras:
    """A zero-shot table, the pruned checkpoint's sizes with and without its zeros, its speed, the paper's theorems.

    Args:
        table: of the search's models; the newest one if left out.
    """
    artifacts = list(store.artifacts())
    table = table or _made_from(artifacts, TABLE_STAGE, "search", search.artifact)
    rows = () if table is None else _zero_shot_rows(json.loads(store.read(table, TABLE_FILE)))
    exported = search.stages.get("export")
    smaller = None if exported is None else _made_from(artifacts, "compress", "export", exported)
    theory = _newest(artifacts, lambda each: is_theory_of(each, search))
    return Extras(
        zero_shot=rows,
        sizes=None if smaller is None else _sizes(smaller),
        speed=newest_speed(store, exported, artifacts),
        theory="" if theory is None else theory.key,
    )


def newest_speed(
    store: ArtifactStore, exported: Artifact | None, artifacts: Iterable[Artifact]
) -> SpeedTable | None:
    """What was last measured of an exported model, on whatever machine; None if nothing was.

    Args:
        artifacts: all of the store.
    """
    measured = None if exported is None else _made_from(artifacts, SPEED_STAGE, "export", exported)
    return None if measured is None else read_speed(store, measured)


def is_theory_of(artifact: Artifact, search: FinishedSearch) -> bool:
    """Whether the theorems were measured on the model and the selection windows of a search, pruned as it prunes."""
    if artifact.recipe.get("name") != THEORY_STAGE:
        return False
    tested = search.stages["evaluate"]
    windows = {"scored": search.stages["selection"].content}
    return artifact.recipe["inputs"] == _part(tested, "inputs") | windows and (
        _part(artifact, "settings")["prune"] == _part(tested, "settings")["prune"]
    )


def _part(artifact: Artifact, name: str) -> dict[str, Any]:
    part = artifact.recipe[name]
    assert isinstance(part, dict), f"the stage {artifact.key} has {name} by their names"
    return part


def _made_from(artifacts: Iterable[Artifact], name: str, role: str, source: Artifact) -> Artifact | None:
    """The newest artifact of a stage that ``source`` is an input of."""

    def reads(artifact: Artifact) -> bool:
        inputs = artifact.recipe.get("inputs")
        return (
            artifact.recipe.get("name") == name
            and isinstance(inputs, dict)
            and inputs.get(role) == source.key
        )

    return _newest(artifacts, reads)


def _newest(artifacts: Iterable[Artifact], wanted: Callable[[Artifact], bool]) -> Artifact | None:
    found = [each for each in artifacts if wanted(each)]
    return max(found, key=lambda each: each.committed, default=None)


def _sizes(compressed: Artifact) -> Sizes:
    """The pruned checkpoint stores its zeros, and so is as large as the dense one."""
    dense, smaller = (int(str(compressed.facts[name])) for name in ("dense bytes", "compressed bytes"))
    return Sizes(dense, dense, smaller)


def _zero_shot_rows(table: dict) -> tuple[ZeroShotRow, ...]:
    return tuple(
        ZeroShotRow(
            row["task"],
            row["dense"]["value"],
            (row["uniform"] or row["best"])["value"],
            row["best"]["value"],
            row["best"]["standard_error"] or 0.0,
            (row["to_uniform"] or {"difference": 0.0})["difference"] / 100,
            (row["to_uniform"] or {"p_value": None})["p_value"],
        )
        for row in (*table["rows"], table["average"])
    )
