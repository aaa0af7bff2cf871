"""Answer all requests of all tasks with the whole model in memory, by lm-eval's own computation."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from layerwise.scoring.continuations import Score
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lm_eval_tasks.questions import Answer, Questions, Response, instances_of
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.whole_model import whole_model
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing
from layerwise.tasks.sources.checkpoint_files import GENERATION_CONFIG

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

REQUESTS_PER_PART = 256  # requests that lm-eval sorts by length together; a resume point may follow each part

SCORES_FILE = "scores.json"
RESPONSES_FILE = "responses.json"


def whole_answers(
    store: ArtifactStore,
    draft: Draft,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Questions],
    dtype: str,
    execution: Execution,
) -> list[Answer]:
    """Answer all requests, in the order of ``instances_of``. Commits resume points, and resumes from one.

    Log-probabilities are computed before answers are generated, which are generated batch by batch.

    Raises:
        ValueError: the answers of a task may be longer than the model has positions.
    """
    from layerwise.tasks.lm_eval_tasks.model_in_memory import WholeLM  # imports lm-eval, which is slow

    scored = [of_task for of_task in questions if not of_task.generated]
    written = [of_task for of_task in questions if of_task.generated]
    model = whole_model(checkpoint, dtype, execution)
    _set_generation(store, checkpoint, model)
    lm = WholeLM(model, tokenizer)
    for of_task in written:
        lm.require_room(of_task)
    scores: list[Score] = []
    responses: list[dict[int, Response]] = [{} for _ in written]  # by number of the request
    parts = list(_parts(scored))
    batches = [(number, batch) for number, of_task in enumerate(written) for batch in lm.batches(of_task)]
    first = 0
    if draft.resumed is not None:
        first, state = draft.resumed.step, draft.resumed.state
        scores += [Score(*row) for row in json.loads(store.read(state, SCORES_FILE))]
        if RESPONSES_FILE in state.files:
            for number, rows in enumerate(json.loads(store.read(state, RESPONSES_FILE))):
                responses[number] |= {request: Response(**row) for request, row in rows}

    def write_answers(state: Draft) -> None:
        state.write(SCORES_FILE, json.dumps([astuple(score) for score in scores]).encode())
        if written:
            rows = [[(request, asdict(one)) for request, one in of_task.items()] for of_task in responses]
            state.write(RESPONSES_FILE, json.dumps(rows).encode())

    with (
        boundaries(draft, execution, write_answers) as reached,
        showing(
            "zero-shot: whole model", len(parts) + len(batches), first, draft.resumed, unit="part"
        ) as show,
    ):
        for step in range(first, len(parts) + len(batches)):
            if step < len(parts):
                scores += [Score(*answer) for answer in lm.loglikelihood(parts[step], disable_tqdm=True)]
            else:
                number, batch = batches[step - len(parts)]
                answers = lm.respond([request for _, request in batch], written[number].answer_tokens)
                responses[number] |= {request: one for (request, _), one in zip(batch, answers, strict=True)}
            show(step + 1)
            reached(step + 1)
    return list(_in_order(questions, scores, responses))


def _parts(questions: Sequence[Questions]) -> "Iterator[list[Instance]]":
    """Yield the requests in parts. A part never has requests of two tasks."""
    for of_task in questions:
        instances = instances_of([of_task])
        for start in range(0, len(instances), REQUESTS_PER_PART):
            yield instances[start : start + REQUESTS_PER_PART]


def _in_order(
    questions: Sequence[Questions], scores: Sequence[Score], responses: Sequence[dict[int, Response]]
) -> Iterator[Answer]:
    """Yield the answers task by task. Those of each kind are in the order of its tasks."""
    left, written = iter(scores), iter(responses)
    for of_task in questions:
        if of_task.generated:
            of_requests = next(written)
            yield from (of_requests[request] for request in range(of_task.count))
        else:
            yield from (next(left) for _ in range(of_task.count))


def _set_generation(store: ArtifactStore, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Give the model the settings of its ``generation_config.json``, as ``from_pretrained`` does."""
    if GENERATION_CONFIG in checkpoint.artifact.files:
        settings = json.loads(store.read(checkpoint.artifact, GENERATION_CONFIG))
        model.generation_config = GenerationConfig.from_dict(settings)
