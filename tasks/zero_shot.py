"""Zero-shot and few-shot: let a model answer the questions of lm-eval's tasks, one artifact per task."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Literal

from transformers import PreTrainedTokenizerBase

from layerwise.display.byte_size import size
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lanes.group_membership import built_together, copy_member, group_stage
from layerwise.tasks.lm_eval_tasks.answers import read_answers, write_answers
from layerwise.tasks.lm_eval_tasks.questions import Questions
from layerwise.tasks.lm_eval_tasks.streamed_scores import streamed_scores
from layerwise.tasks.lm_eval_tasks.whole_model_answers import whole_answers
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import DTYPES
from layerwise.tasks.results.run_names import model_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sources.checkpoint_files import GENERATION_CONFIG


@dataclass(frozen=True)
class ZeroShotSettings:
    """Settings that decide how questions are answered.

    Attributes:
        dtype: dtype that the model computes in; log-probabilities are computed in float32.
        way: "streamed" reads one decoder layer at a time; "memory" holds the whole model and uses lm-eval's own
            computation. Their results agree to 1e-3 but not bit by bit, so the way is part of the key.
    """

    dtype: str
    way: Literal["streamed", "memory"] = "streamed"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.way not in ("streamed", "memory"):
            raise ValueError(
                f"zero-shot tasks cannot run with dtype {self.dtype!r} and way {self.way!r}. Use one of "
                f"{', '.join(DTYPES)} as dtype, and streamed or memory as way."
            )


def zero_shot_stage(checkpoint: Checkpoint, questions: Questions, settings: ZeroShotSettings) -> Stage:
    """Describe the answers to one task.

    The seed that the documents were drawn with and the version of lm-eval are not part of the key: the identity of the
    questions covers all documents and every word that is asked, also the examples of few-shot tasks.
    """
    by_role = {
        "checkpoint": checkpoint.identity,
        "tokenizer": checkpoint.tokenizer_identity,
        "questions": questions.identity,
    }
    if questions.generated and GENERATION_CONFIG in checkpoint.artifact.files:
        by_role["generation"] = checkpoint.artifact.files[GENERATION_CONFIG].digest
    return Stage("zero_shot", 1, {"task": questions.task, **asdict(settings)}, by_role)


def require_affordable(
    checkpoint: Checkpoint, questions: Sequence[Questions], settings: ZeroShotSettings
) -> None:
    """Refuse tasks with generated answers for a model that is streamed: each token would need all weights.

    Raises:
        ValueError: there are such tasks; says what they would cost, and what to do.
    """
    generated = [of_task for of_task in questions if of_task.generated]
    if settings.way == "memory" or not generated:
        return
    index = checkpoint.index
    layers = sum(index.layer_bytes)
    needed = (layers + index.outer_bytes) // DTYPES[index.dtype].itemsize * DTYPES[settings.dtype].itemsize
    passes = max(of_task.answer_tokens for of_task in generated)
    raise ValueError(
        f"{', '.join(of_task.task for of_task in generated)}: the model writes answers of up to {passes} tokens. A "
        f"streamed model reads all layers ({size(layers)}) for every token: up to {passes} passes, "
        f"{size(passes * layers)} for each model, even with all documents together. Use --way memory, which needs "
        f"{size(needed)} of memory for the weights, or choose tasks that are scored by log-probabilities."
    )


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
    """Let the model answer, in one group, the questions of all tasks whose answers the store lacks.

    A task's artifact holds ``documents.parquet`` (for each document: log-probability of every choice and whether greedy
    decoding gives it, or the text that the model wrote and its length; whether the answer is right) and ``metrics.json``.
    It does not depend on the other tasks of the group.

    Args:
        questions: questions of every task, see ``layerwise.tasks.lm_eval_tasks.task_loading``.

    Returns:
        The artifacts by task name.

    Raises:
        ValueError: the tokenizer has neither a first nor a last token to replace an empty context; or the answers of a
            task are generated, and the model is streamed or has too few positions.
    """
    require_affordable(checkpoint, questions, settings)
    stages = [zero_shot_stage(checkpoint, of_task, settings) for of_task in questions]

    def run(members: Sequence[int]) -> Artifact:
        together = [questions[number] for number in members]
        return _group(store, checkpoint, together, settings, execution)

    def copy(group: Artifact, position: int, number: int, draft: Draft) -> None:
        _copy_task(store, group, position, draft)

    artifacts = built_together(store, stages, run, copy)
    return {of_task.task: artifact for of_task, artifact in zip(questions, artifacts, strict=True)}


def _group(
    store: ArtifactStore,
    checkpoint: Checkpoint,
    questions: Sequence[Questions],
    settings: ZeroShotSettings,
    execution: Execution,
) -> Artifact:
    answer = streamed_scores if settings.way == "streamed" else whole_answers

    def build(draft: Draft) -> None:
        tokenizer = _tokenizer(checkpoint)
        answers = answer(store, draft, checkpoint, tokenizer, questions, settings.dtype, execution)
        start = 0
        for position, of_task in enumerate(questions):
            write_answers(draft, of_task, answers[start : start + of_task.count], _folder(position))
            start += of_task.count

    stages = [zero_shot_stage(checkpoint, of_task, settings) for of_task in questions]
    return store.get_or_build(group_stage(stages), build)


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    tokenizer = checkpoint.tokenizer()
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {model_title(checkpoint)} has neither a bos_token nor an eos_token; lm-eval puts one of "
            "them before text without a context. Set one of them in tokenizer_config.json and import again."
        )
    return tokenizer


def _copy_task(store: ArtifactStore, group: Artifact, position: int, draft: Draft) -> None:
    folder = _folder(position)
    copy_member(store, group, folder, draft)
    metrics = read_answers(store, group, folder).metrics
    draft.facts |= {"task": metrics.task, "documents": metrics.acc.documents, "acc": metrics.acc.value}
    draft.facts["lm-eval"] = version("lm_eval")


def _folder(position: int) -> str:
    """Return the folder of one task's files in the artifact of its group."""
    return f"task-{position:03d}/"
