"""Compare zero-shot answers: accuracy of the dense, the uniform and the best model, document by document."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from layerwise.scoring.accuracy import Accuracy, average, combined_error
from layerwise.scoring.mcnemar import paired_answers, pooled
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lm_eval_tasks.answers import TaskAnswers, read_answers

AVERAGE = "average"


@dataclass(frozen=True)
class PairedAccuracy:
    """How the best model's accuracy differs from another's on the same documents.

    Attributes:
        difference: best less other, in percentage points.
        standard_error: of the difference, in percentage points; None for a single document.
        p_value: of McNemar's exact test; of the average, on all documents of all tasks together.
        significant: whether the p-value is below 5 %.
    """

    difference: float
    standard_error: float | None
    p_value: float
    significant: bool


@dataclass(frozen=True)
class ZeroShotRow:
    """One task's line in the table, or the average's.

    Attributes:
        documents: how many were asked; of the average those of all tasks.
        uniform: None if the uniform model is the best one, or was not asked.
        to_dense: what pruning costs.
        to_uniform: what pruning layer by layer gains.
    """

    task: str
    documents: int
    dense: Accuracy
    uniform: Accuracy | None
    best: Accuracy
    to_dense: PairedAccuracy
    to_uniform: PairedAccuracy | None


@dataclass(frozen=True)
class ZeroShotComparison:
    """The table: one row per task, and the average with every task counting the same."""

    rows: tuple[ZeroShotRow, ...]
    average: ZeroShotRow


def compare_zero_shot(
    store: ArtifactStore,
    dense: Mapping[str, Artifact],
    uniform: Mapping[str, Artifact] | None,
    best: Mapping[str, Artifact],
) -> ZeroShotComparison:
    """Put the artifacts of ``zero_shot`` side by side, by ``acc``.

    Args:
        dense: of the dense model, by task.
        uniform: of the uniform model; None if it is the best one, or was not exported.
        best: of the chosen model.

    Raises:
        ValueError: the models were not asked the same questions.
    """
    answers = {name: _answers(store, model) for name, model in (("dense", dense), ("best", best))}
    if uniform is not None:
        answers["uniform"] = _answers(store, uniform)
    for name, of_model in answers.items():
        _check_same_questions(answers["best"], of_model, name)
    tasks = list(answers["best"])
    rows = tuple(_row(task, {name: [model[task]] for name, model in answers.items()}) for task in tasks)
    in_order = {name: [model[task] for task in tasks] for name, model in answers.items()}
    return ZeroShotComparison(rows, _row(AVERAGE, in_order))


def _answers(store: ArtifactStore, artifacts: Mapping[str, Artifact]) -> dict[str, TaskAnswers]:
    return {task: read_answers(store, artifact) for task, artifact in artifacts.items()}


def _check_same_questions(
    expected: Mapping[str, TaskAnswers], found: Mapping[str, TaskAnswers], name: str
) -> None:
    if expected.keys() != found.keys() or not found:
        raise ValueError(
            f"the best model answered {', '.join(expected) or 'nothing'}, the {name} model "
            f"{', '.join(found) or 'nothing'}. Run the same tasks, at least one, with both."
        )
    for task, answers in expected.items():
        ours, theirs = answers.metrics, found[task].metrics
        if ours.questions != theirs.questions:
            raise ValueError(
                f"{task}: the best model was asked the questions {ours.questions} ({ours.acc.documents} documents, "
                f"version {ours.version}), the {name} model {theirs.questions} ({theirs.acc.documents}, version "
                f"{theirs.version}). Run both with the same number of documents, seed, data and version of lm-eval."
            )


def _row(title: str, answers: Mapping[str, Sequence[TaskAnswers]]) -> ZeroShotRow:
    """One line about the tasks in ``answers``, by model and in the same order."""
    accuracies = {
        name: average([of_task.metrics.acc for of_task in tasks]) for name, tasks in answers.items()
    }
    best, uniform = answers["best"], answers.get("uniform")
    return ZeroShotRow(
        title,
        accuracies["best"].documents,
        accuracies["dense"],
        accuracies.get("uniform"),
        accuracies["best"],
        _paired(best, answers["dense"]),
        None if uniform is None else _paired(best, uniform),
    )


def _paired(best: Sequence[TaskAnswers], other: Sequence[TaskAnswers]) -> PairedAccuracy:
    """The mean of the tasks' differences."""
    tasks = [paired_answers(one.correct, two.correct) for one, two in zip(best, other, strict=True)]
    error = combined_error([task.standard_error for task in tasks])
    all_tasks = pooled(tasks)
    return PairedAccuracy(
        100 * fmean(task.difference for task in tasks),
        None if error is None else 100 * error,
        all_tasks.p_value,
        all_tasks.significant,
    )
