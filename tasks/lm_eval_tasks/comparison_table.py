"""The table of a zero-shot comparison: as an artifact that belongs to a search, and as rows for people."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lm_eval_tasks.comparison import PairedAccuracy, ZeroShotComparison

TABLE_STAGE, TABLE_FILE = "zero_shot_table", "table.json"


def store_table(
    store: ArtifactStore,
    search: Artifact,
    answers: Mapping[str, Mapping[str, Artifact]],
    comparison: ZeroShotComparison,
) -> Artifact:
    """Commit the table.

    Args:
        search: whose models were asked.
        answers: artifacts of ``zero_shot`` by model and task, which ``comparison`` was made of.
    """
    by_role = {
        f"{model} {task}": artifact.key
        for model, of_model in answers.items()
        for task, artifact in of_model.items()
    }

    def build(draft: Draft) -> None:
        draft.write(TABLE_FILE, json.dumps(asdict(comparison), indent=1).encode())

    return store.get_or_build(Stage(TABLE_STAGE, 1, None, {"search": search.key, **by_role}), build)


def table_rows(comparison: ZeroShotComparison) -> list[dict[str, str | float]]:
    """Accuracies in per cent, and what is gained on the uniform plan, with McNemar's p."""
    rows: list[dict[str, str | float]] = []
    for row in (*comparison.rows, comparison.average):
        error = row.best.standard_error
        cells: dict[str, str | float] = {
            "task": row.task,
            "documents": row.documents,
            "dense": round(100 * row.dense.value, 2),
            "uniform": "" if row.uniform is None else round(100 * row.uniform.value, 2),
            "best": round(100 * row.best.value, 2),
            "standard error": "" if error is None else round(100 * error, 2),
            **_shown("to dense", row.to_dense),
        }
        rows.append(cells | ({} if row.to_uniform is None else _shown("to uniform", row.to_uniform)))
    return rows


def _shown(name: str, difference: PairedAccuracy) -> dict[str, str | float]:
    return {name: f"{difference.difference:+.2f}", f"p {name}": f"{difference.p_value:.2g}"}
