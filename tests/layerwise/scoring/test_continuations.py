"""Continuations scored layer by layer have the log-probabilities that the whole model gives each one alone."""

import pytest
import torch

from layerwise.models.streaming import StreamedModel
from layerwise.scoring.continuations import Continuation, advance, continuation_batches, score_batch

FAMILIES = [
    "llama",
    "llama-tied",
    "mistral-window",
    "gemma2-window",
    "recurrent-gemma",
    "opt",
    "gpt2",
    "bloom",
]
POSITIONS = 64


@pytest.fixture
def continuations() -> list[Continuation]:
    """Return contexts of 1 to 40 tokens with continuations of 1 to 12; the last two differ only in their last token."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 1), (1, 12), (3, 2), (9, 1), (9, 7), (20, 3), (40, 5), (17, 1)]
    sequences = [torch.randint(3, 61, (sum(size),), generator=generator).tolist() for size in sizes]
    found = [Continuation(tuple(ids), size[1]) for ids, size in zip(sequences, sizes, strict=True)]
    return [*found, Continuation((*found[-1].inputs, 7), 1)]


def scores_of(model: StreamedModel, layers, continuations):
    batches = continuation_batches(continuations, POSITIONS)
    parts = [model.embed(batch.input_ids) for batch in batches]
    model.release_embedding()
    for index, weights in enumerate(layers):
        advance(model, index, weights, parts)
    scores = {}
    for batch, hidden_states in zip(batches, parts, strict=True):
        scores |= score_batch(model, hidden_states, batch)
    return [scores[number] for number in range(len(continuations))]


def by_itself(model, continuation: Continuation) -> tuple[float, bool]:
    """Score one sequence without padding with the whole model, by definition."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([continuation.inputs]), use_cache=False).logits[0]
    log_probabilities = logits.double().log_softmax(-1)[-continuation.length :]
    chosen = [row[token].item() for row, token in zip(log_probabilities, continuation.targets, strict=True)]
    return sum(chosen), log_probabilities.argmax(-1).tolist() == list(continuation.targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_whole_model_on_each_sequence_by_itself(tiny_model, continuations, family):
    tiny = tiny_model(family)
    scores = scores_of(tiny.streamed(), tiny.layers(), continuations)
    expected = [by_itself(tiny.reference, continuation) for continuation in continuations]
    assert [score.log_probability for score in scores] == pytest.approx(
        [log_probability for log_probability, _ in expected], abs=1e-3
    )
    assert [score.greedy for score in scores] == [greedy for _, greedy in expected]


def test_the_most_probable_continuation_is_greedy_and_another_is_not(tiny_model):
    tiny, context = tiny_model(), (5, 9, 14)
    with torch.no_grad():
        best = tiny.reference(input_ids=torch.tensor([context])).logits[0, -1].argmax().item()
    other = 3 if best != 3 else 4
    pair = [Continuation((*context, token), 1) for token in (best, other)]
    assert [score.greedy for score in scores_of(tiny.streamed(), tiny.layers(), pair)] == [True, False]


def test_continuations_that_differ_in_their_last_token_share_a_row(continuations):
    asked = [row for batch in continuation_batches(continuations, POSITIONS) for row in batch.asked]
    assert len(asked) == len(continuations) - 1
    assert [number for row in asked if len(row) > 1 for number, _ in row] == [7, 8]


def test_every_sequence_is_in_one_batch_and_padded_by_less_than_an_eighth_or_to_eight():
    lengths = range(2, 592)
    batches = continuation_batches([Continuation(tuple(range(n)), 1) for n in lengths], longest=590)
    rows = [
        (number, batch.input_ids[row].tolist())
        for batch in batches
        for row, asked in enumerate(batch.asked)
        for number, _ in asked
    ]
    assert sorted(number for number, _ in rows) == list(range(len(lengths)))
    for number, row in rows:
        length = lengths[number] - 1
        assert row[:length] == list(range(length))
        assert len(row) < length + max(8, length / 8)
        assert len(row) <= 590
    # Few lengths, because each needs its own masks.
    assert len({batch.input_ids.shape[1] for batch in batches}) <= 40


def test_batches_have_no_more_tokens_than_one_forward_pass(two_windows_at_a_time):
    same = [Continuation((5, token, 9), 1) for token in range(3, 12)]  # nine sequences of eight tokens
    assert [len(batch.asked) for batch in continuation_batches(same, POSITIONS)] == [4, 4, 1]


def test_the_head_is_applied_to_a_few_rows_at_a_time(tiny_model, continuations, monkeypatch):
    tiny = tiny_model()
    at_once = scores_of(tiny.streamed(), tiny.layers(), continuations)
    monkeypatch.setattr("layerwise.scoring.continuations.LOSS_POSITIONS", 24)
    in_parts = scores_of(tiny.streamed(), tiny.layers(), continuations)
    assert [s.log_probability for s in in_parts] == pytest.approx(
        [s.log_probability for s in at_once], abs=1e-4
    )


def test_the_head_is_applied_only_to_the_positions_needed(tiny_model, monkeypatch):
    tiny, seen = tiny_model(), []
    logits = StreamedModel.logits

    def watched(model, hidden_states):
        seen.append(tuple(hidden_states.shape[:2]))
        return logits(model, hidden_states)

    monkeypatch.setattr(StreamedModel, "logits", watched)
    scores_of(tiny.streamed(), tiny.layers(), [Continuation(tuple(range(3, 40)), 2)])
    assert seen == [(1, 2)]


@pytest.mark.parametrize("tokens, length", [((5, 6), 2), ((5,), 1), ((5, 6), 0)])
def test_a_continuation_without_context_or_tokens_is_refused(tokens, length):
    with pytest.raises(ValueError, match="cannot be scored"):
        Continuation(tokens, length)
