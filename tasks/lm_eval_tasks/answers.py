"""Answers of a model to the questions of one task: a table by document, and the metrics."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean

import pyarrow as pa

from layerwise.scoring.accuracy import Accuracy, accuracy
from layerwise.scoring.continuations import Score
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table, write_table
from layerwise.tasks.lm_eval_tasks.questions import ACCURACY, Answer, Questions, Response

DOCUMENTS_FILE = "documents.parquet"
METRICS_FILE = "metrics.json"
SCHEMA = pa.schema(
    {
        "document": pa.int64(),
        "log_probabilities": pa.list_(pa.float64()),
        "greedy": pa.list_(pa.bool_()),
        "acc": pa.bool_(),
        "acc_norm": pa.bool_(),
    }
)
# ``acc`` is the outcome that is compared; the other outcomes follow in a column each, see ``_column``.
GENERATED_COLUMNS = {
    "document": pa.int64(),
    "response": pa.string(),
    "tokens": pa.int64(),
    "cut": pa.bool_(),
    "acc": pa.bool_(),
}


@dataclass(frozen=True)
class ResponseLength:
    """Length of the answers that a model wrote.

    Attributes:
        tokens: mean number of tokens.
        cut: number of answers that were cut at their maximum length.
    """

    tokens: float
    cut: int


@dataclass(frozen=True)
class TaskMetrics:
    """Metrics of a model on one task.

    Attributes:
        version: version of the task.
        questions: identity of the questions.
        available: number of documents that the task has.
        not_finite: number of requests with a log-probability that is not finite, because the model overflows. Their
            answers count as impossible.
        acc: share of documents whose most probable choice is right, or whose generated answer is right by ``metric``.
        acc_norm: the same with log-probabilities per character; None if the task does not have this metric.
        metric: metric that ``acc`` is the mean of, with its filter, as in lm-eval.
        shots: number of examples in front of every document.
        truncated: number of documents whose examples or context were cut at the start, because the model has too few
            positions.
        length: length of generated answers; None if the task is scored by log-probabilities.
        others: shares of right answers by the other metrics and filters of a task with generated answers.
    """

    task: str
    version: str
    questions: str
    available: int
    not_finite: int
    acc: Accuracy
    acc_norm: Accuracy | None
    metric: str = ACCURACY
    shots: int = 0
    truncated: int = 0
    length: ResponseLength | None = None
    others: Mapping[str, Accuracy] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskAnswers:
    """The metrics of one task.

    Attributes:
        correct: whether the answer was right, by document, in the order of the data set.
        other_correct: the same by each of the other metrics.
    """

    metrics: TaskMetrics
    correct: tuple[bool, ...]
    other_correct: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    def by_metric(self, name: str) -> "TaskAnswers":
        """Return the answers by one of the other metrics."""
        metrics = replace(self.metrics, acc=self.metrics.others[name], metric=name, others={})
        return TaskAnswers(metrics, self.other_correct[name])


def write_answers(draft: Draft, questions: Questions, answers: Sequence[Answer], folder: str = "") -> None:
    """Grade the answers to all requests of a task, and write the table and the metrics.

    Args:
        answers: answers in the order of the requests.
        folder: prefix of the file names, with a "/" at its end.

    Raises:
        ValueError: the task has answers that are partly right.
    """
    if questions.generated:
        table, metrics = _of_responses(questions, [one for one in answers if isinstance(one, Response)])
    else:
        table, metrics = _of_scores(questions, [one for one in answers if isinstance(one, Score)])
    write_table(draft, f"{folder}{DOCUMENTS_FILE}", table)
    draft.write(f"{folder}{METRICS_FILE}", json.dumps(asdict(metrics), indent=1).encode())


def read_answers(store: ArtifactStore, artifact: Artifact, folder: str = "") -> TaskAnswers:
    """Read what ``write_answers`` wrote into ``folder`` of an artifact."""
    found = json.loads(store.read(artifact, f"{folder}{METRICS_FILE}"))
    found["acc"] = Accuracy(**found["acc"])
    found["acc_norm"] = found["acc_norm"] and Accuracy(**found["acc_norm"])
    # Artifacts of earlier versions do not have these.
    found["length"] = found.get("length") and ResponseLength(**found["length"])
    found["others"] = {name: Accuracy(**other) for name, other in found.get("others", {}).items()}
    columns = ["acc", *map(_column, found["others"])]
    table = read_table(store, artifact, f"{folder}{DOCUMENTS_FILE}", columns)
    correct, *others = (tuple(table[name].to_pylist()) for name in columns)
    return TaskAnswers(TaskMetrics(**found), correct, dict(zip(found["others"], others, strict=True)))


def _of_scores(questions: Questions, scores: Sequence[Score]) -> tuple[pa.Table, TaskMetrics]:
    finite = [math.isfinite(score.log_probability) for score in scores]
    counted = [
        score if is_finite else replace(score, log_probability=-math.inf)
        for score, is_finite in zip(scores, finite, strict=True)
    ]
    grades = questions.graded(counted)
    rows, start, truncated = [], 0, 0
    for document, requests, grade in zip(questions.document_ids, questions.requests, grades, strict=True):
        own = counted[start : start + len(requests)]
        start += len(requests)
        truncated += any(score.truncated for score in own)
        rows.append(
            {
                "document": document,
                "log_probabilities": [score.log_probability for score in own],
                "greedy": [score.greedy for score in own],
                **grade,
            }
        )
    normalised = [grade["acc_norm"] for grade in grades if "acc_norm" in grade]
    metrics = TaskMetrics(
        questions.task,
        questions.version,
        questions.identity,
        questions.available,
        finite.count(False),
        accuracy([grade[ACCURACY] for grade in grades]),
        accuracy(normalised) if normalised else None,
        shots=questions.shots,
        truncated=truncated,
    )
    return pa.Table.from_pylist(rows, schema=SCHEMA), metrics


def _of_responses(questions: Questions, responses: Sequence[Response]) -> tuple[pa.Table, TaskMetrics]:
    grades = questions.graded(responses)
    compared, *others = questions.outcomes
    rows = [
        {
            "document": document,
            "response": response.text,
            "tokens": response.tokens,
            "cut": response.cut,
            "acc": grade[compared],
            **{_column(name): grade[name] for name in others},
        }
        for document, response, grade in zip(questions.document_ids, responses, grades, strict=True)
    ]
    metrics = TaskMetrics(
        questions.task,
        questions.version,
        questions.identity,
        questions.available,
        0,
        accuracy([grade[compared] for grade in grades]),
        None,
        compared,
        questions.shots,
        sum(response.truncated for response in responses),
        ResponseLength(
            fmean(response.tokens for response in responses), sum(response.cut for response in responses)
        ),
        {name: accuracy([grade[name] for grade in grades]) for name in others},
    )
    columns = GENERATED_COLUMNS | dict.fromkeys(map(_column, others), pa.bool_())
    return pa.Table.from_pylist(rows, schema=pa.schema(columns)), metrics


def _column(metric: str) -> str:
    """Return the column of another metric; metrics may have the name of another column."""
    return f"acc by {metric}"
