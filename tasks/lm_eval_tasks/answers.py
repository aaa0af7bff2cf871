"""Answers of a model to the questions of one task: a table by document, and the metrics."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from layerwise.scoring.accuracy import Accuracy, accuracy
from layerwise.scoring.continuations import Score
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table, write_table
from layerwise.tasks.lm_eval_tasks.questions import Questions

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


@dataclass(frozen=True)
class TaskMetrics:
    """Metrics of a model on one task.

    Attributes:
        version: version of the task.
        questions: identity of the questions.
        available: number of documents that the task has.
        not_finite: number of requests with a log-probability that is not finite, because the model overflows. Their
            answers count as impossible.
        acc: share of documents whose most probable choice is right.
        acc_norm: the same with log-probabilities per character; None if the task does not have this metric.
    """

    task: str
    version: str
    questions: str
    available: int
    not_finite: int
    acc: Accuracy
    acc_norm: Accuracy | None


@dataclass(frozen=True)
class TaskAnswers:
    """The metrics of one task.

    Attributes:
        correct: whether the answer was right, by document, in the order of the data set.
    """

    metrics: TaskMetrics
    correct: tuple[bool, ...]


def write_answers(draft: Draft, questions: Questions, scores: Sequence[Score], folder: str = "") -> None:
    """Grade the answers to all requests of a task, and write the table and the metrics.

    Args:
        scores: scores in the order of the requests.
        folder: prefix of the file names, with a "/" at its end.

    Raises:
        ValueError: the task has answers that are partly right.
    """
    finite = [math.isfinite(score.log_probability) for score in scores]
    counted = [
        score if is_finite else replace(score, log_probability=-math.inf)
        for score, is_finite in zip(scores, finite, strict=True)
    ]
    grades = questions.graded(counted)
    rows, start = [], 0
    for document, requests, grade in zip(questions.document_ids, questions.requests, grades, strict=True):
        own = counted[start : start + len(requests)]
        start += len(requests)
        rows.append(
            {
                "document": document,
                "log_probabilities": [score.log_probability for score in own],
                "greedy": [score.greedy for score in own],
                **grade,
            }
        )
    write_table(draft, f"{folder}{DOCUMENTS_FILE}", pa.Table.from_pylist(rows, schema=SCHEMA))
    normalised = [grade["acc_norm"] for grade in grades if "acc_norm" in grade]
    metrics = TaskMetrics(
        questions.task,
        questions.version,
        questions.identity,
        questions.available,
        finite.count(False),
        accuracy([grade["acc"] for grade in grades]),
        accuracy(normalised) if normalised else None,
    )
    draft.write(f"{folder}{METRICS_FILE}", json.dumps(asdict(metrics), indent=1).encode())


def read_answers(store: ArtifactStore, artifact: Artifact, folder: str = "") -> TaskAnswers:
    """Read what ``write_answers`` wrote into ``folder`` of an artifact."""
    correct = read_table(store, artifact, f"{folder}{DOCUMENTS_FILE}", ["acc"])["acc"].to_pylist()
    document = json.loads(store.read(artifact, f"{folder}{METRICS_FILE}"))
    normalised = document["acc_norm"] and Accuracy(**document["acc_norm"])
    metrics = TaskMetrics(**{**document, "acc": Accuracy(**document["acc"]), "acc_norm": normalised})
    return TaskAnswers(metrics, tuple(correct))
