"""Log-probabilities of continuations after their contexts, for a model that runs one decoder layer at a time.

What zero-shot tasks ask of a model: how probable is each answer after the question. Sequences of similar length go
through the layers together, padded on the right: attention is causal, so that no token ever sees the padding.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.models.hidden_states import batches
from layerwise.models.streaming import LOSS_POSITIONS, StreamedModel

PADDING = 0  # any token will do
SMALLEST_STEP = 8  # tokens; lengths are rounded up to multiples of this, longer ones to coarser steps


@dataclass(frozen=True)
class Continuation:
    """Tokens whose log-probability is asked for, and those before them.

    Attributes:
        tokens: of the context and then of the continuation.
        length: how many of them, from the end, are the continuation's.
    """

    tokens: tuple[int, ...]
    length: int

    def __post_init__(self) -> None:
        if not 0 < self.length < len(self.tokens):
            raise ValueError(
                f"a continuation of {self.length} tokens in a sequence of {len(self.tokens)} cannot be scored. Both "
                "the continuation and its context need at least one token."
            )

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model is fed: the last token is only asked for."""
        return self.tokens[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        return self.tokens[-self.length :]


@dataclass(frozen=True)
class Score:
    """What the model says of one continuation.

    Attributes:
        log_probability: in nats, summed over the continuation's tokens.
        greedy: whether each of its tokens is the most probable one.
    """

    log_probability: float
    greedy: bool


@dataclass(frozen=True)
class ContinuationBatch:
    """Sequences that go through a layer in one forward pass.

    Attributes:
        input_ids: shape ``(sequences, seqlen)``, padded on the right.
        asked: continuations by the row of their sequence, each with its number among all continuations. Those that
            differ in their last token only share a row.
    """

    input_ids: Tensor
    asked: tuple[tuple[tuple[int, Continuation], ...], ...]


def continuation_batches(continuations: Sequence[Continuation], longest: int) -> list[ContinuationBatch]:
    """Put continuations into batches, the longest first; which ones share a batch depends on nothing else.

    Args:
        continuations: in any order.
        longest: no sequence is padded beyond so many tokens, for models that know no more positions.
    """
    rows: dict[tuple[int, ...], list[tuple[int, Continuation]]] = defaultdict(list)
    for number, continuation in enumerate(continuations):
        rows[continuation.inputs].append((number, continuation))
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for inputs in sorted(rows):
        by_length[max(len(inputs), min(_rounded_up(len(inputs)), longest))].append(inputs)
    found = []
    for seqlen, sequences in sorted(by_length.items(), reverse=True):
        padded = torch.full((len(sequences), seqlen), PADDING)
        for row, inputs in zip(padded, sequences, strict=True):
            row[: len(inputs)] = torch.tensor(inputs)
        start = 0
        for input_ids in batches(padded):
            asked = tuple(tuple(rows[inputs]) for inputs in sequences[start : start + len(input_ids)])
            found.append(ContinuationBatch(input_ids, asked))
            start += len(input_ids)
    return found


def _rounded_up(length: int) -> int:
    """The next length that is used: at most an eighth longer, and few different ones, as each has masks of its own."""
    step = max(SMALLEST_STEP, 2 ** (length.bit_length() - 4))
    return -(-length // step) * step


@torch.no_grad()
def advance(model: StreamedModel, index: int, weights: Mapping[str, Tensor], parts: Sequence[Tensor]) -> None:
    """Take hidden states through one decoder layer, in place.

    Args:
        model: computes the layer.
        index: of the layer.
        weights: of the layer, by name relative to it.
        parts: the batches' hidden states, each of shape ``(sequences, seqlen, hidden_size)``.
    """
    with model.loaded(index, weights) as layer:
        for hidden_states in parts:
            hidden_states.copy_(model.run_layer(index, layer, hidden_states))


def score_batch(model: StreamedModel, hidden_states: Tensor, batch: ContinuationBatch) -> dict[int, Score]:
    """Score a batch's continuations, by their number; the head computes the positions they need and no others.

    Args:
        model: applies its norm and head.
        hidden_states: the last layer's output, shape ``(sequences, seqlen, hidden_size)``.
        batch: what is asked.
    """
    longest = max(continuation.length for row in batch.asked for _, continuation in row)
    scores: dict[int, Score] = {}
    rows_at_once = max(1, LOSS_POSITIONS // longest)
    for start in range(0, len(batch.asked), rows_at_once):
        asked = batch.asked[start : start + rows_at_once]
        ends = torch.tensor([len(row[0][1].inputs) for row in asked])
        positions = (ends[:, None] + torch.arange(-longest, 0)).clamp(min=0)  # (rows, longest)
        rows = torch.arange(start, start + len(asked))[:, None]
        log_probabilities = model.logits(hidden_states[rows, positions]).float().log_softmax(-1)
        for of_row, row in zip(log_probabilities, asked, strict=True):
            scores |= {number: _score(of_row, continuation) for number, continuation in row}
    return scores


def _score(log_probabilities: Tensor, continuation: Continuation) -> Score:
    """One continuation from the last positions of its row, shape ``(positions, vocab_size)``."""
    ours = log_probabilities[-continuation.length :]
    targets = torch.tensor(continuation.targets, device=ours.device)
    loss = nn.functional.nll_loss(ours, targets, reduction="sum")
    return Score(-loss.item(), bool((ours.argmax(-1) == targets).all()))
