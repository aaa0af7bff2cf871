"""Score all requests of all tasks with the whole model in memory, by lm-eval's own computation."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from layerwise.scoring.continuations import Score
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lm_eval_tasks.questions import Questions, instances_of
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.whole_model import whole_model
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# Sequences per forward pass. This is not a setting, because the last bits of every result depend on the batch's shape.
BATCH_SIZE = 8
REQUESTS_PER_PART = 256  # requests that lm-eval sorts by length together; a resume point may follow each part

SCORES_FILE = "scores.json"


def whole_scores(
    store: ArtifactStore,
    draft: Draft,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Questions],
    dtype: str,
    execution: Execution,
) -> list[Score]:
    """Score all requests, in the order of ``instances_of``. Commits resume points, and resumes from one."""
    from lm_eval.models.huggingface import HFLM  # slow to import, and may not be installed

    scores: list[Score] = []
    parts, first = list(_parts(questions)), 0
    if draft.resumed is not None:
        first = draft.resumed.step
        scores += [Score(*row) for row in json.loads(store.read(draft.resumed.state, SCORES_FILE))]

    def write_scores(state: Draft) -> None:
        state.write(SCORES_FILE, json.dumps([astuple(score) for score in scores]).encode())

    model = whole_model(checkpoint, dtype, execution)
    # In the model's 16 bits, log-probabilities would be so coarse that choices tie and the first one wins.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, softmax_dtype="float32")
    title = "zero-shot: whole model"
    with (
        boundaries(draft, execution, write_scores) as reached,
        showing(title, len(parts), first, draft.resumed, unit="part") as show,
    ):
        for number, part in enumerate(parts[first:], first + 1):
            scores += [Score(*answer) for answer in lm.loglikelihood(part, disable_tqdm=True)]
            show(number)
            reached(number)
    return scores


def _parts(questions: Sequence[Questions]) -> "Iterator[list[Instance]]":
    """Yield the requests in parts. A part never has requests of two tasks."""
    for of_task in questions:
        instances = instances_of([of_task])
        for start in range(0, len(instances), REQUESTS_PER_PART):
            yield instances[start : start + REQUESTS_PER_PART]
