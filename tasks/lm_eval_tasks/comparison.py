"""Compare the accuracy on tasks of lm-eval of the models of a search, document by document."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from layerwise.scoring.accuracy import Accuracy, average, average_by_size, combined_error, pooled_error
from layerwise.scoring.mcnemar import paired_answers, pooled
from layerwise.storage.artifact import Artifact, input_of
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lm_eval_tasks.answers import ResponseLength, TaskAnswers, read_answers
from layerwise.tasks.lm_eval_tasks.questions import ACCURACY
from layerwise.tasks.lm_eval_tasks.task_groups import TaskGroup

TABLE_STAGE, TABLE_FILE = "zero_shot_table", "table.json"
AVERAGE = "average"
DISTILLED = "distilled"  # name of the model, and role of its artifact in the inputs of the table


@dataclass(frozen=True)
class PairedAccuracy:
    """Difference in accuracy between two models on the same documents.

    Attributes:
        difference: first minus second model, in percentage points.
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
    """Row of one task, of a group of tasks, or of the average, in the table.

    Attributes:
        documents: number of documents; in the average, those of all tasks.
        uniform: None if the uniform model is the best one, or was not tested.
        to_dense: cost of pruning: best minus dense.
        to_uniform: gain over the uniform plan: best minus uniform.
        pruned: the best plan without recovery; None if the search does not recover.
        to_pruned: gain by the recovery: best minus pruned.
        metric: metric whose mean the accuracy is, with its filter, as in lm-eval; empty if the tasks differ.
        shots: number of examples in front of every document; None if the tasks differ.
        truncated: number of documents whose prompt was cut at the start, because the model has too few positions.
        group: name of the group that the task or the inner group belongs to; empty without a group.
        lengths: length of the generated answers by model; empty if there are none.
        distilled: the distilled model; None if the search has none.
        distilled_to_best: gain by the distillation: distilled minus best.
        distilled_to_dense: cost that is left: distilled minus dense.
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
    metric: str = ACCURACY
    shots: int | None = 0
    truncated: int = 0
    group: str = ""
    lengths: Mapping[str, ResponseLength] = field(default_factory=dict)
    distilled: Accuracy | None = None
    distilled_to_best: PairedAccuracy | None = None
    distilled_to_dense: PairedAccuracy | None = None


@dataclass(frozen=True)
class ZeroShotComparison:
    """The table: one row per task, and the average, in which all tasks have the same weight.

    Attributes:
        average: average in which a group of tasks counts as one task.
        groups: one row per group, in which the tasks are weighted as lm-eval does.
        others: rows of the other metrics and filters of tasks with generated answers.
    """

    rows: tuple[ZeroShotRow, ...]
    average: ZeroShotRow
    groups: tuple[ZeroShotRow, ...] = ()
    others: tuple[ZeroShotRow, ...] = ()


def compare_zero_shot(
    store: ArtifactStore,
    dense: Mapping[str, Artifact],
    uniform: Mapping[str, Artifact] | None,
    best: Mapping[str, Artifact],
    pruned: Mapping[str, Artifact] | None = None,
    groups: Sequence[TaskGroup] = (),
    distilled: Mapping[str, Artifact] | None = None,
) -> ZeroShotComparison:
    """Compare the artifacts of ``zero_shot`` by the accuracy of each task.

    Args:
        dense: artifacts of the dense model, by task.
        uniform: those of the uniform model; None if it is the best one, or was not exported.
        best: those of the chosen model.
        pruned: those of the chosen plan without recovery; None if the search does not recover.
        groups: groups of the tasks.
        distilled: artifacts of the distilled model; None if the search has none.

    Raises:
        ValueError: the models were not asked the same questions.
    """
    answers = {name: _answers(store, model) for name, model in (("dense", dense), ("best", best))}
    others = {"uniform": uniform, "pruned": pruned, DISTILLED: distilled}
    answers |= {name: _answers(store, model) for name, model in others.items() if model is not None}
    for name, of_model in answers.items():
        _check_same_questions(answers["best"], of_model, name)
    tasks = list(answers["best"])
    inside = {task: group.name for group in groups if not group.inside for task in group.tasks}
    rows = tuple(replace(_row(task, answers, [_Unit((task,))]), group=inside.get(task, "")) for task in tasks)
    of_groups = tuple(
        replace(_row(group.name, answers, [_Unit(group.tasks, group.weight_by_size)]), group=group.inside)
        for group in groups
    )
    whole = [_Unit(group.tasks, group.weight_by_size) for group in groups if not group.inside]
    units = [*(_Unit((task,)) for task in tasks if task not in inside), *whole]
    return ZeroShotComparison(rows, _row(AVERAGE, answers, units), of_groups, tuple(_others(answers, rows)))


def store_comparison(
    store: ArtifactStore,
    search: Artifact,
    answers: Mapping[str, Mapping[str, Artifact]],
    comparison: ZeroShotComparison,
    groups: Sequence[TaskGroup] = (),
    distilled: Artifact | None = None,
) -> Artifact:
    """Commit the table.

    Args:
        search: search whose models were tested.
        answers: artifacts of ``zero_shot`` by model and task that ``comparison`` was made from.
        groups: groups of the tasks.
        distilled: artifact of the distilled model; None if the search has none.
    """
    by_role = {} if distilled is None else {DISTILLED: distilled.key}
    by_role |= {
        f"{model} {task}": artifact.key
        for model, of_model in answers.items()
        for task, artifact in of_model.items()
    }
    settings = {"groups": list(groups)} if groups else None

    def build(draft: Draft) -> None:
        draft.write(TABLE_FILE, json.dumps(asdict(comparison), indent=1).encode())

    return store.get_or_build(Stage(TABLE_STAGE, 1, settings, {"search": search.key, **by_role}), build)


def read_comparison(store: ArtifactStore, table: Artifact) -> ZeroShotComparison:
    """Read what ``store_comparison`` wrote, also in an earlier version."""
    found = json.loads(store.read(table, TABLE_FILE))
    rows, groups, others = (tuple(map(_parsed, found.get(name, ()))) for name in ("rows", "groups", "others"))
    return ZeroShotComparison(rows, _parsed(found["average"]), groups, others)


def has_distilled(table: Artifact, distilled: Artifact) -> bool:
    """Return whether the artifact of a table has the accuracies of this distilled model."""
    return input_of(table, DISTILLED) == distilled.key


def without_distilled(comparison: ZeroShotComparison) -> ZeroShotComparison:
    """Return the table without the distilled model."""

    def without(row: ZeroShotRow) -> ZeroShotRow:
        lengths = {name: length for name, length in row.lengths.items() if name != DISTILLED}
        return replace(row, lengths=lengths, distilled=None, distilled_to_best=None, distilled_to_dense=None)

    rows, groups, others = (
        tuple(map(without, each)) for each in (comparison.rows, comparison.groups, comparison.others)
    )
    return ZeroShotComparison(rows, without(comparison.average), groups, others)


def is_plain(comparison: ZeroShotComparison) -> bool:
    """Return whether all tasks are zero-shot, have the metric acc and no group, and no prompt was truncated."""
    return not comparison.groups and all(
        row.metric == ACCURACY and not row.shots and not row.truncated for row in comparison.rows
    )


def comparison_rows(comparison: ZeroShotComparison) -> list[dict[str, str | float]]:
    """Return the table as rows for people: accuracies in per cent, differences, and p-values of McNemar's test.

    Columns on examples, metrics and generated answers are left out if ``is_plain``.
    """
    rows = in_reading_order(comparison)
    models = ("dense", "uniform", "best", "pruned", DISTILLED)
    written = [name for name in models if any(name in row.lengths for row in rows)]
    return [_cells(row, is_plain(comparison), written) for row in rows]


def in_two_tables(
    rows: Sequence[Mapping[str, str | float]],
) -> tuple[list[dict[str, str | float]], list[dict[str, str | float]]]:
    """Split ``comparison_rows`` into accuracies, and differences with their p-values: one table would be too wide to read."""
    compared = {name for row in rows for name in row if f"p {name}" in row}
    p_values = {f"p {name}" for name in compared}
    accuracies = [
        {name: value for name, value in row.items() if name not in compared | p_values} for row in rows
    ]
    differences = [
        {
            "task": row["task"],
            **{name: f"{row[name]} ({row[f'p {name}']})" for name in row if name in compared},
        }
        for row in rows
    ]
    return accuracies, differences


def in_reading_order(comparison: ZeroShotComparison) -> list[ZeroShotRow]:
    """Return all rows: tasks without a group, each with its other metrics; groups, each with its tasks; the average."""
    others: dict[str, list[ZeroShotRow]] = {}
    for row in comparison.others:
        others.setdefault(row.task, []).append(row)

    def tasks_of(group: str) -> list[ZeroShotRow]:
        own = [row for row in comparison.rows if row.group == group]
        return [each for row in own for each in (row, *others.get(row.task, ()))]

    rows = tasks_of("")
    for group in comparison.groups:
        if not group.group:
            rows += [group, *(inner for inner in comparison.groups if inner.group == group.task)]
            rows += tasks_of(group.task)
    return [*rows, comparison.average]


def _cells(row: ZeroShotRow, plain: bool, written: Sequence[str]) -> dict[str, str | float]:
    """Return the cells of a row.

    Args:
        plain: leave out the columns on examples and metrics.
        written: models with generated answers, whose lengths get a column.
    """
    error = row.best.standard_error
    cells: dict[str, str | float] = {"task": f"- {row.task}" if row.group else row.task}
    if not plain:
        cells |= {"metric": row.metric, "examples": "" if row.shots is None else row.shots}
    cells |= {
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
    if row.distilled is not None and row.distilled_to_best is not None and row.distilled_to_dense is not None:
        cells |= {"distilled": round(100 * row.distilled.value, 2)}
        cells |= _shown("distilled to best", row.distilled_to_best)
        cells |= _shown("distilled to dense", row.distilled_to_dense)
    for name in written:
        length = row.lengths.get(name)
        title = "without recovery" if name == "pruned" else name
        cells[f"tokens, {title}"] = "" if length is None else f"{length.tokens:.1f} ({length.cut} cut)"
    if not plain:
        cells["truncated prompts"] = row.truncated
    return cells


def _parsed(row: Mapping[str, Any]) -> ZeroShotRow:
    """Return a row from its JSON."""
    accuracies = {
        name: row.get(name) and Accuracy(**row[name])
        for name in ("dense", "uniform", "best", "pruned", "distilled")
    }
    paired = {
        name: row.get(name) and PairedAccuracy(**row[name])
        for name in ("to_dense", "to_uniform", "to_pruned", "distilled_to_best", "distilled_to_dense")
    }
    lengths = {name: ResponseLength(**length) for name, length in row.get("lengths", {}).items()}
    return ZeroShotRow(**{**row, **accuracies, **paired, "lengths": lengths})


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


@dataclass(frozen=True)
class _Unit:
    """Tasks that count once in an average.

    Attributes:
        weight_by_size: whether a task weighs as much as it has documents; matters only for several tasks.
    """

    tasks: tuple[str, ...]
    weight_by_size: bool = False

    def mean(
        self, values: Sequence[float], errors: Sequence[float | None], documents: Sequence[int]
    ) -> tuple[float, float | None]:
        """Return the mean of the tasks' values, and its standard error."""
        if len(values) == 1:
            return values[0], errors[0]
        if self.weight_by_size:
            return average_by_size(values, documents), pooled_error(errors, documents)
        return fmean(values), combined_error(errors)


def _row(title: str, answers: Mapping[str, Mapping[str, TaskAnswers]], units: Sequence[_Unit]) -> ZeroShotRow:
    """Make the row of the mean of some units.

    Args:
        answers: answers by model and task.
    """
    accuracies = {
        name: average([_accuracy(model, unit) for unit in units]) for name, model in answers.items()
    }
    dense, best = answers["dense"], answers["best"]
    uniform, pruned, distilled = (answers.get(name) for name in ("uniform", "pruned", DISTILLED))
    found = [best[task].metrics for unit in units for task in unit.tasks]
    metrics, shots = {each.metric for each in found}, {each.shots for each in found}
    return ZeroShotRow(
        title,
        accuracies["best"].documents,
        accuracies["dense"],
        accuracies.get("uniform"),
        accuracies["best"],
        _paired(best, dense, units),
        None if uniform is None else _paired(best, uniform, units),
        accuracies.get("pruned"),
        None if pruned is None else _paired(best, pruned, units),
        metrics.pop() if len(metrics) == 1 else "",
        shots.pop() if len(shots) == 1 else None,
        sum(each.truncated for each in found),
        lengths=_lengths(answers, units) if len(units) == 1 else {},
        distilled=accuracies.get(DISTILLED),
        distilled_to_best=None if distilled is None else _paired(distilled, best, units),
        distilled_to_dense=None if distilled is None else _paired(distilled, dense, units),
    )


def _accuracy(answers: Mapping[str, TaskAnswers], unit: _Unit) -> Accuracy:
    tasks = [answers[task].metrics.acc for task in unit.tasks]
    documents = [task.documents for task in tasks]
    value, error = unit.mean(
        [task.value for task in tasks], [task.standard_error for task in tasks], documents
    )
    return Accuracy(value, error, sum(documents))


def _paired(
    first: Mapping[str, TaskAnswers], second: Mapping[str, TaskAnswers], units: Sequence[_Unit]
) -> PairedAccuracy:
    """Average the differences of the units, first minus second model."""
    means, pairs = [], []
    for unit in units:
        tasks = [paired_answers(first[task].correct, second[task].correct) for task in unit.tasks]
        means.append(
            unit.mean(
                [task.difference for task in tasks],
                [task.standard_error for task in tasks],
                [task.documents for task in tasks],
            )
        )
        pairs += tasks
    error = combined_error([of_unit for _, of_unit in means])
    all_tasks = pooled(pairs)
    return PairedAccuracy(
        100 * fmean(difference for difference, _ in means),
        None if error is None else 100 * error,
        all_tasks.p_value,
        all_tasks.significant,
    )


def _lengths(
    answers: Mapping[str, Mapping[str, TaskAnswers]], units: Sequence[_Unit]
) -> dict[str, ResponseLength]:
    """Return the lengths by model, over all generated answers."""
    lengths = {}
    for name, model in answers.items():
        found = [model[task].metrics for unit in units for task in unit.tasks]
        written = [(each.length, each.acc.documents) for each in found if each.length is not None]
        if written:
            tokens = average_by_size(
                [length.tokens for length, _ in written], [count for _, count in written]
            )
            lengths[name] = ResponseLength(tokens, sum(length.cut for length, _ in written))
    return lengths


def _others(
    answers: Mapping[str, Mapping[str, TaskAnswers]], rows: Sequence[ZeroShotRow]
) -> Iterator[ZeroShotRow]:
    """Yield a row for every other metric of a task with generated answers."""
    for row in rows:
        for metric in answers["best"][row.task].metrics.others:
            chosen = {name: {row.task: model[row.task].by_metric(metric)} for name, model in answers.items()}
            yield replace(_row(row.task, chosen, [_Unit((row.task,))]), group=row.group, lengths={})


def _shown(name: str, difference: PairedAccuracy) -> dict[str, str | float]:
    return {name: f"{difference.difference:+.2f}", f"p {name}": f"{difference.p_value:.2g}"}
