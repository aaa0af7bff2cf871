"""Log-probabilities of continuations after their contexts, from a model that runs one decoder layer at a time.

Zero-shot tasks need the probability of each answer after its question. Sequences of similar length are batched and
padded on the right; attention is causal, so the padding does not affect the other tokens.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.models.hidden_states import batches
from layerwise.models.streaming import LOSS_POSITIONS, StreamedModel

PADDING = 0  # any token id
# Tokens; lengths are rounded up to multiples of this, long ones to multiples of a larger step.
SMALLEST_STEP = 8


@dataclass(frozen=True)
class Continuation:
    """A continuation whose log-probability is needed, with its context.

    Attributes:
        tokens: tokens of the context, followed by those of the continuation.
        length: number of tokens of the continuation.
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
        """Return the tokens that the model reads: all but the last one."""
        return self.tokens[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        return self.tokens[-self.length :]


@dataclass(frozen=True)
class Score:
    """Score of one continuation.

    Attributes:
        log_probability: in nats, summed over the tokens of the continuation.
        greedy: whether every token of the continuation is the most probable one.
        truncated: whether tokens at the start of the context were left out, because the model has too few positions.
    """

    log_probability: float
    greedy: bool
    truncated: bool = False


@dataclass(frozen=True)
class ContinuationBatch:
    """Sequences that share a forward pass through a layer.

    Attributes:
        input_ids: shape ``(sequences, seqlen)``, padded on the right.
        asked: for each row of ``input_ids``, its continuations and their indices among all continuations.
            Continuations that differ only in their last token share a row.
    """

    input_ids: Tensor
    asked: tuple[tuple[tuple[int, Continuation], ...], ...]


def continuation_batches(continuations: Sequence[Continuation], longest: int) -> list[ContinuationBatch]:
    """Group continuations into batches, the longest first, independently of their order.

    Args:
        continuations: continuations in any order.
        longest: maximum number of tokens to pad a sequence to (the number of positions of the model).
    """
    rows: dict[tuple[int, ...], list[tuple[int, Continuation]]] = defaultdict(list)
    for number, continuation in enumerate(continuations):
        rows[continuation.inputs].append((number, continuation))
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for inputs in sorted(rows):
        by_length[padded_length(len(inputs), longest)].append(inputs)
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


def padded_length(length: int, longest: int | None) -> int:
    """Return the length to pad a sequence to: one of a few, as each needs its own masks, and at most an eighth more.

    Args:
        longest: number of positions of the model, beyond which no sequence is padded; None for no limit.
    """
    step = max(SMALLEST_STEP, 2 ** (length.bit_length() - 4))
    rounded = -(-length // step) * step
    return rounded if longest is None else max(length, min(rounded, longest))


@torch.no_grad()
def advance(model: StreamedModel, index: int, weights: Mapping[str, Tensor], parts: Sequence[Tensor]) -> None:
    """Run one decoder layer on hidden states, in place.

    Args:
        model: computes the layer.
        index: index of the layer.
        weights: weights of the layer, by name relative to the layer.
        parts: states of each batch, shape ``(sequences, seqlen, layout.size)``.
    """
    with model.loaded(index, weights) as layer:
        for hidden_states in parts:
            hidden_states.copy_(model.run_layer(index, layer, hidden_states))


def score_batch(model: StreamedModel, hidden_states: Tensor, batch: ContinuationBatch) -> dict[int, Score]:
    """Score the continuations of a batch; the head is applied only to the positions that they need.

    Args:
        model: applies its norm and head.
        hidden_states: output of the last layer, shape ``(sequences, seqlen, hidden_size)``.
        batch: the sequences and their continuations.

    Returns:
        Scores by index of the continuation.
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
        scores |= _scores(log_probabilities, asked)
    return scores


def _scores(
    log_probabilities: Tensor, asked: Sequence[Sequence[tuple[int, Continuation]]]
) -> dict[int, Score]:
    """Score continuations from the log-probabilities at the last positions of their rows; read from the device once.

    Args:
        log_probabilities: shape ``(rows, positions, vocab_size)``.
        asked: the continuations of each row, and their indices.
    """
    device, longest = log_probabilities.device, log_probabilities.shape[1]
    numbered = [(row, each) for row, of_row in enumerate(asked) for each in of_row]
    targets = torch.zeros(len(numbered), longest, dtype=torch.long)
    padding = torch.ones(len(numbered), longest, dtype=torch.bool)
    for (_, (_, continuation)), line, padded in zip(numbered, targets, padding, strict=True):
        line[-continuation.length :] = torch.tensor(continuation.targets)
        padded[-continuation.length :] = False
    rows = torch.tensor([row for row, _ in numbered])
    rows, targets, padding = rows.to(device), targets.to(device), padding.to(device)
    positions = torch.arange(longest, device=device)
    of_targets = log_probabilities[rows[:, None], positions, targets].masked_fill_(padding, 0)
    greedy = (log_probabilities.argmax(-1)[rows] == targets).logical_or_(padding).all(-1)
    found = torch.stack([of_targets.sum(-1, dtype=torch.float64), greedy.double()], dim=1).cpu().tolist()
    return {
        number: Score(log_probability, bool(is_greedy))
        for (_, (number, _)), (log_probability, is_greedy) in zip(numbered, found, strict=True)
    }
