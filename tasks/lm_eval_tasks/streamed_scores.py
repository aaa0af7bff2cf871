"""Score all requests of all tasks with a model that is streamed, one decoder layer at a time."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerwise.models.streaming import StreamedModel
from layerwise.scoring.continuations import (
    Continuation,
    ContinuationBatch,
    Score,
    advance,
    continuation_batches,
    score_batch,
)
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensor_into, write_tensors
from layerwise.tasks.lm_eval_tasks.questions import Questions, instances_of
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import streamed_model
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing

# Tokens that go through the model in one pass over the weights. Their hidden states take 2 GiB in 16 bits at the width
# of a 7B model. With fewer tokens, a GPU would wait for the weights.
TOKENS_PER_PASS = 1 << 18

STATES_FILE = "hidden_states.safetensors"
SCORES_FILE = "scores.json"


def streamed_scores(
    store: ArtifactStore,
    draft: Draft,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Questions],
    dtype: str,
    execution: Execution,
) -> list[Score]:
    """Score all requests for log-probabilities, in the order of ``instances_of``. Commits resume points, and resumes from one.

    The weights are read once for every ``TOKENS_PER_PASS`` tokens, across tasks. A batch never mixes the sequences of
    two tasks, so the scores of a task do not depend on the other tasks.
    """
    # lm-eval is slow to import, and may not be installed.
    from layerwise.tasks.lm_eval_tasks.streamed_model import StreamedLM

    model = streamed_model(checkpoint, dtype, execution)

    def score(continuations: Sequence[Continuation]) -> list[Score]:
        batches, start = [], 0
        for of_task in questions:
            end = start + of_task.count
            for batch in continuation_batches(continuations[start:end], lm.max_length):
                batches.append((start, batch))
            start = end
        passes = _Passes(store, checkpoint, model, batches, execution)
        scores = passes.run(draft)
        return [scores[number] for number in range(len(continuations))]

    lm = StreamedLM(model, tokenizer, score)
    return [Score(*answer) for answer in lm.loglikelihood(instances_of(questions), disable_tqdm=True)]


class _Passes:
    """Passes of batches through the model, each with at most ``TOKENS_PER_PASS`` tokens.

    Args:
        batches: batches, each with the number of the request that its request numbers are relative to.
    """

    def __init__(
        self,
        store: ArtifactStore,
        checkpoint: Checkpoint,
        model: StreamedModel,
        batches: Sequence[tuple[int, ContinuationBatch]],
        execution: Execution,
    ) -> None:
        self.store, self.checkpoint, self.model, self.execution = store, checkpoint, model, execution
        self.passes = list(_passes(batches))
        self.scores: dict[int, Score] = {}  # by number of the request, from all completed passes
        self.hidden_states: list[Tensor] = []  # by batch of the current pass

    def run(self, draft: Draft) -> dict[int, Score]:
        layers = self.model.num_layers
        total, first = layers * len(self.passes), 0
        if draft.resumed is not None:
            first = draft.resumed.step
            rows = json.loads(self.store.read(draft.resumed.state, SCORES_FILE))
            self.scores |= {request: Score(*score) for request, *score in rows}
        read_before = self.checkpoint.bytes_read
        with (
            boundaries(draft, self.execution, self.write_state) as reached,
            showing("zero-shot: streamed model", total, first, draft.resumed) as show,
        ):
            for number in range(first // layers, len(self.passes)):
                start = max(first - number * layers, 0)
                self.begin(number, draft, start)
                for index, weights in enumerate(
                    self.checkpoint.layers(start, self.execution.torch_device), start
                ):
                    advance(self.model, index, weights, self.hidden_states)
                    if index == layers - 1:
                        self.finish(number)
                    show(number * layers + index + 1)
                    reached(number * layers + index + 1)
        draft.facts["weights read, bytes"] = self.checkpoint.bytes_read - read_before
        return self.scores

    def begin(self, number: int, draft: Draft, start: int) -> None:
        """Prepare the hidden states of a pass as inputs of layer ``start``."""
        room = self.execution.hidden_states_room()
        for _, batch in self.passes[number]:
            states = room.empty((*batch.input_ids.shape, self.model.layout.size), self.model.dtype)
            self.hidden_states.append(states.copy_(self.model.embed(batch.input_ids)))
        self.model.release_embedding()
        if start:
            assert draft.resumed is not None, "only a resume point can start in the middle of a pass"
            for position, states in enumerate(self.hidden_states):
                read_tensor_into(
                    self.store, draft.resumed.state, STATES_FILE, _batch_tensor(position), states
                )

    def finish(self, number: int) -> None:
        """Score the requests of a pass after the last layer."""
        for (offset, batch), states in zip(self.passes[number], self.hidden_states, strict=True):
            scores = score_batch(self.model, states, batch)
            self.scores |= {offset + request: score for request, score in scores.items()}
        self.hidden_states = []

    def write_state(self, state: Draft) -> None:
        rows = [(request, *astuple(score)) for request, score in self.scores.items()]
        state.write(SCORES_FILE, json.dumps(rows).encode())
        if self.hidden_states:
            named = ((_batch_tensor(n), states) for n, states in enumerate(self.hidden_states))
            write_tensors(state, STATES_FILE, named)


def _passes(
    batches: Sequence[tuple[int, ContinuationBatch]],
) -> Iterator[list[tuple[int, ContinuationBatch]]]:
    """Group consecutive batches into passes of at most ``TOKENS_PER_PASS`` tokens."""
    together: list[tuple[int, ContinuationBatch]] = []
    tokens = 0
    for offset, batch in batches:
        if together and tokens + batch.input_ids.numel() > TOKENS_PER_PASS:
            yield together
            together, tokens = [], 0
        together.append((offset, batch))
        tokens += batch.input_ids.numel()
    if together:
        yield together


def _batch_tensor(position: int) -> str:
    return f"batch-{position:05d}"
