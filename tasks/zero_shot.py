"""Zero-shot: what a model answers to the questions of lm-eval's tasks, one artifact per task."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Literal

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from layerwise.accuracy import Accuracy, accuracy
from layerwise.continuations import Score
from storage.artifact import Artifact
from storage.draft import Committed, Draft
from storage.stage import Stage
from storage.store import ArtifactStore
from storage.tables import read_table, write_table
from tasks.checkpoint import Checkpoint
from tasks.execution import Execution
from tasks.grouping import begun_groups, group_stage, note_group
from tasks.questions import Questions
from tasks.run_names import model_title
from tasks.stage_task import stage_task
from tasks.streamed import DTYPES
from tasks.streamed_scores import streamed_scores
from tasks.whole_scores import whole_scores

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
class ZeroShotSettings:
    """How questions are answered.

    Attributes:
        dtype: in which the model computes; log-probabilities are taken in float32.
        way: "streamed" reads one decoder layer at a time, "memory" holds the whole model and is lm-eval's own
            computation. They agree to 1e-3, not to the bit, so that the way is part of the key.
    """

    dtype: str
    way: Literal["streamed", "memory"] = "streamed"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.way not in ("streamed", "memory"):
            raise ValueError(
                f"zero-shot tasks cannot be run in {self.dtype!r}, {self.way!r}. The dtype is one of "
                f"{', '.join(DTYPES)}; the way is streamed or memory."
            )


@dataclass(frozen=True)
class TaskMetrics:
    """How a model did on one task.

    Attributes:
        version: the task's own.
        questions: identity of what was asked.
        available: how many documents the task has.
        not_finite: requests whose log-probability is not a number: the model overflows, and they count as impossible.
        acc: share of documents whose most probable choice is right.
        acc_norm: the same with log-probabilities per character; None if the task has it not.
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
    """The metrics of one task, and by document, in the order of the data set, whether the answer was right."""

    metrics: TaskMetrics
    correct: tuple[bool, ...]


def zero_shot_stage(checkpoint: Checkpoint, questions: Questions, settings: ZeroShotSettings) -> Stage:
    """The stage of one task.

    By what seed the documents were drawn, and by which version of lm-eval the questions were put together, is no part
    of it: the identity of the questions has all documents, and every word of what is asked.
    """
    by_role = {
        "checkpoint": checkpoint.identity,
        "tokenizer": checkpoint.tokenizer_identity,
        "questions": questions.identity,
    }
    return Stage("zero_shot", 1, {"task": questions.task, **asdict(settings)}, by_role)


@stage_task(
    about=lambda checkpoint, questions, **_: (
        f"{model_title(checkpoint)}: {', '.join(of_task.task for of_task in questions)}"
    )
)
def zero_shot(
    store: ArtifactStore,
    checkpoint: Checkpoint,
    questions: Sequence[Questions],
    settings: ZeroShotSettings,
    execution: Execution,
) -> dict[str, Artifact]:
    """Have the model answer the questions of all tasks that the store does not have yet, together.

    A task's artifact holds ``documents.parquet`` (by document: log-probability of every choice, whether greedy decoding
    gives it, whether the answer is right) and ``metrics.json``, and is the same whatever was asked with it.

    Args:
        questions: of every task, see ``load_questions``.

    Returns:
        The artifacts by the name of their task.

    Raises:
        ValueError: the tokenizer has no token that an empty context could be replaced by.
    """
    stages = [zero_shot_stage(checkpoint, of_task, settings) for of_task in questions]
    while None in (artifacts := [store.find(stage) for stage in stages]):
        missing = [number for number, artifact in enumerate(artifacts) if artifact is None]
        members = next(begun_groups(store, stages, missing), None)
        if members is None:
            members = missing
            try:
                note_group(store, [stages[number] for number in members])
            except Committed:
                continue  # another process has just finished one of them
        together = [questions[number] for number in members]
        group = _group(store, checkpoint, together, settings, execution)
        for position, number in enumerate(members):
            if number in missing:
                store.get_or_build(stages[number], partial(_copy_task, store, group, position))
    return {
        of_task.task: artifact
        for of_task, artifact in zip(questions, artifacts, strict=True)
        if artifact is not None
    }


def _group(
    store: ArtifactStore,
    checkpoint: Checkpoint,
    questions: Sequence[Questions],
    settings: ZeroShotSettings,
    execution: Execution,
) -> Artifact:
    answer = streamed_scores if settings.way == "streamed" else whole_scores

    def build(draft: Draft) -> None:
        tokenizer = _tokenizer(checkpoint)
        scores = answer(store, draft, checkpoint, tokenizer, questions, settings.dtype, execution)
        start = 0
        for position, of_task in enumerate(questions):
            _write_task(draft, _folder(position), of_task, scores[start : start + of_task.count])
            start += of_task.count

    stages = [zero_shot_stage(checkpoint, of_task, settings) for of_task in questions]
    return store.get_or_build(group_stage(stages), build)


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    tokenizer = checkpoint.tokenizer()
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {model_title(checkpoint)} names neither a first nor a last token, one of which lm-eval "
            "puts before text without a context. Set bos_token or eos_token in tokenizer_config.json and import again."
        )
    return tokenizer


def _write_task(draft: Draft, folder: str, questions: Questions, scores: Sequence[Score]) -> None:
    """Write the table and the metrics of one task."""
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
    write_table(draft, f"{folder}/{DOCUMENTS_FILE}", pa.Table.from_pylist(rows, schema=SCHEMA))
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
    draft.write(f"{folder}/{METRICS_FILE}", json.dumps(asdict(metrics), indent=1).encode())


def _copy_task(store: ArtifactStore, group: Artifact, position: int, draft: Draft) -> None:
    for name in (DOCUMENTS_FILE, METRICS_FILE):
        draft.write(name, store.read(group, f"{_folder(position)}/{name}"))
    metrics = _metrics_from(store.read(group, f"{_folder(position)}/{METRICS_FILE}"))
    draft.facts |= {
        "task": metrics.task,
        "documents": metrics.acc.documents,
        "acc": metrics.acc.value,
        "lm-eval": version("lm_eval"),
    }


def _folder(position: int) -> str:
    """Folder of one task's files in its group's artifact."""
    return f"task-{position:03d}"


def read_answers(store: ArtifactStore, artifact: Artifact) -> TaskAnswers:
    """What the artifact of a task holds."""
    correct = read_table(store, artifact, DOCUMENTS_FILE, ["acc"])["acc"].to_pylist()
    return TaskAnswers(_metrics_from(store.read(artifact, METRICS_FILE)), tuple(correct))


def _metrics_from(content: bytes) -> TaskMetrics:
    document = json.loads(content)
    normalised = document["acc_norm"] and Accuracy(**document["acc_norm"])
    return TaskMetrics(**{**document, "acc": Accuracy(**document["acc"]), "acc_norm": normalised})
