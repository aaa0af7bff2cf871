"""Compare the zero-shot accuracy of the dense, the uniform and the best model, document by document."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from layerwise.scoring.accuracy import Accuracy, average, combined_error
from layerwise.scoring.mcnemar import paired_answers, pooled
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lm_eval_tasks.answers import TaskAnswers, read_answers

TABLE_STAGE, TABLE_FILE = "zero_shot_table", "table.json"
AVERAGE = "average"


@dataclass(frozen=True)
class PairedAccuracy:
    """Difference in accuracy between the best model and another one, on the same documents.

    Attributes:
        difference: best minus other, in percentage points.
        standard_error: standard error of the difference, in percentage points; None for a single document.
        p_value: p-value of McNemar's exact test. In the average, all documents of all tasks are tested together.
        significant: whether the p-value is below 5 %.
    """

    difference: float
    standard_error: float | None
    p_value: float
    significant: bool


@dataclass(frozen=True)
class ZeroShotRow:
    """Row of one task, or of the average, in the table.

    Attributes:
        documents: number of documents; in the average, those of all tasks.
        uniform: None if the uniform model is the best one, or was not tested.
        to_dense: cost of pruning.
        to_uniform: gain over the uniform plan.
        pruned: the best plan without recovery; None if the search does not recover.
        to_pruned: gain by the recovery.
    """

    task: str
    documents: int
    dense: Accuracy
    uniform: Accuracy | None
    best: Accuracy
    to_dense: PairedAccuracy
    to_uniform: PairedAccuracy | None
    pruned: Accuracy | None = None
    to_pruned: PairedAccuracy | None = None


@dataclass(frozen=True)
class ZeroShotComparison:
    """The table: one row per task, and the average, in which all tasks have the same weight."""

    rows: tuple[ZeroShotRow, ...]
    average: ZeroShotRow


def compare_zero_shot(
    store: ArtifactStore,
    dense: Mapping[str, Artifact],
    uniform: Mapping[str, Artifact] | None,
    best: Mapping[str, Artifact],
    pruned: Mapping[str, Artifact] | None = None,
) -> ZeroShotComparison:
    """Compare the artifacts of ``zero_shot`` by ``acc``.

    Args:
        dense: artifacts of the dense model, by task.
        uniform: those of the uniform model; None if it is the best one, or was not exported.
        best: those of the chosen model.
        pruned: those of the chosen plan without recovery; None if the search does not recover.

    Raises:
        ValueError: the models were not asked the same questions.
    """
    answers = {name: _answers(store, model) for name, model in (("dense", dense), ("best", best))}
    if uniform is not None:
        answers["uniform"] = _answers(store, uniform)
    if pruned is not None:
        answers["pruned"] = _answers(store, pruned)
    for name, of_model in answers.items():
        _check_same_questions(answers["best"], of_model, name)
    tasks = list(answers["best"])
    rows = tuple(_row(task, {name: [model[task]] for name, model in answers.items()}) for task in tasks)
    in_order = {name: [model[task] for task in tasks] for name, model in answers.items()}
    return ZeroShotComparison(rows, _row(AVERAGE, in_order))


def store_comparison(
    store: ArtifactStore,
    search: Artifact,
    answers: Mapping[str, Mapping[str, Artifact]],
    comparison: ZeroShotComparison,
) -> Artifact:
    """Commit the table.

    Args:
        search: search whose models were tested.
        answers: artifacts of ``zero_shot`` by model and task that ``comparison`` was made from.
    """
    by_role = {
        f"{model} {task}": artifact.key
        for model, of_model in answers.items()
        for task, artifact in of_model.items()
    }

    def build(draft: Draft) -> None:
        draft.write(TABLE_FILE, json.dumps(asdict(comparison), indent=1).encode())

    return store.get_or_build(Stage(TABLE_STAGE, 1, None, {"search": search.key, **by_role}), build)


def comparison_rows(comparison: ZeroShotComparison) -> list[dict[str, str | float]]:
    """Return the table as rows for people: accuracies in per cent, differences, and p-values of McNemar's test."""
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
        if row.to_uniform is not None:
            cells |= _shown("to uniform", row.to_uniform)
        if row.pruned is not None and row.to_pruned is not None:
            cells |= {"without recovery": round(100 * row.pruned.value, 2)}
            cells |= _shown("by recovery", row.to_pruned)
        rows.append(cells)
    return rows


def _answers(store: ArtifactStore, artifacts: Mapping[str, Artifact]) -> dict[str, TaskAnswers]:
    return {task: read_answers(store, artifact) for task, artifact in artifacts.items()}


def _check_same_questions(
    expected: Mapping[str, TaskAnswers], found: Mapping[str, TaskAnswers], name: str
) -> None:
    if expected.keys() != found.keys() or not found:
        raise ValueError(
            f"the best model answered {', '.join(expected) or 'nothing'}, but the {name} model "
            f"{', '.join(found) or 'nothing'}. Run the same tasks, at least one, with both."
        )
    for task, answers in expected.items():
        ours, theirs = answers.metrics, found[task].metrics
        if ours.questions != theirs.questions:
            raise ValueError(
                f"{task}: the best model was asked the questions {ours.questions} ({ours.acc.documents} documents, "
                f"version {ours.version}), but the {name} model {theirs.questions} ({theirs.acc.documents} documents, "
                f"version {theirs.version}). Run both with the same documents, seed, data and version of lm-eval."
            )


def _row(title: str, answers: Mapping[str, Sequence[TaskAnswers]]) -> ZeroShotRow:
    """Make the row for some tasks.

    Args:
        answers: answers by model, with the tasks in the same order.
    """
    accuracies = {
        name: average([of_task.metrics.acc for of_task in tasks]) for name, tasks in answers.items()
    }
    best, uniform, pruned = answers["best"], answers.get("uniform"), answers.get("pruned")
    return ZeroShotRow(
        title,
        accuracies["best"].documents,
        accuracies["dense"],
        accuracies.get("uniform"),
        accuracies["best"],
        _paired(best, answers["dense"]),
        None if uniform is None else _paired(best, uniform),
        accuracies.get("pruned"),
        None if pruned is None else _paired(best, pruned),
    )


def _paired(best: Sequence[TaskAnswers], other: Sequence[TaskAnswers]) -> PairedAccuracy:
    """Average the differences of the tasks."""
    tasks = [paired_answers(one.correct, two.correct) for one, two in zip(best, other, strict=True)]
    error = combined_error([task.standard_error for task in tasks])
    all_tasks = pooled(tasks)
    return PairedAccuracy(
        100 * fmean(task.difference for task in tasks),
        None if error is None else 100 * error,
        all_tasks.p_value,
        all_tasks.significant,
    )


def _shown(name: str, difference: PairedAccuracy) -> dict[str, str | float]:
    return {name: f"{difference.difference:+.2f}", f"p {name}": f"{difference.p_value:.2g}"}
