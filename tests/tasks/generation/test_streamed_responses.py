"""Responses of a streamed model: groups of prompts, draws of tokens, positions; whole runs are in test_generate_calibration."""

import pytest
import torch
from transformers import MptConfig, MptForCausalLM

from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.tasks.generation.generation_settings import GenerationSettings
from layerwise.tasks.generation.streamed_responses import (
    next_tokens,
    prompt_groups,
    streamed_responses,
    uniform_draws,
)
from layerwise.tasks.running.execution import Execution


def test_sequences_that_are_answered_together_fit_into_memory(monkeypatch):
    monkeypatch.setattr("layerwise.tasks.generation.streamed_responses.TOKENS_AT_ONCE", 30)
    groups = prompt_groups([[1] * length for length in (5, 5, 50, 1, 1, 1)], 8)
    assert groups == [range(0, 2), range(2, 3), range(3, 6)]


def test_tokens_are_drawn_from_the_softmax_of_all_logits():
    logits = torch.tensor([0.0, -1.0, 2.0, 1.0, -30.0])
    draws = uniform_draws(20_000, seed=1)
    found = next_tokens(logits.expand(len(draws), -1), draws, temperature=2.0)
    expected = (logits / 2).softmax(0) * len(draws)
    counts = torch.bincount(found, minlength=5)
    assert (counts - expected).abs().le(4 * expected.sqrt() + 1).all()
    assert next_tokens(logits[None], torch.tensor([1 - 2**-53], dtype=torch.float64), 0.01).tolist() == [2]
    assert next_tokens(logits[None], torch.tensor([0.99], dtype=torch.float64), 0).tolist() == [2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_text(temperature, value):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    with pytest.raises(ValueError, match="logits are not finite in float32"):
        next_tokens(logits, torch.full((2,), 0.5, dtype=torch.float64), temperature)
    hidden = torch.tensor([[0.0, float("-inf"), -1e9]])
    assert next_tokens(hidden, torch.tensor([0.5], dtype=torch.float64), 1.0).tolist() == [0]


def test_responses_may_fill_the_positions_of_a_model(small_run):
    """MPT computes its ALiBi for 20 positions; lengths are not rounded up beyond them."""
    run = small_run(
        MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=97, max_seq_len=20))
    )
    stage = Stage("generate_calibration", 1, {}, {})
    settings = GenerationSettings("float32", 6, 0.0, 2, 0, "streamed")
    prompts = [[5] * 13, [7] * 3]
    found = streamed_responses(
        run.store, Draft(run.store, stage), run.checkpoint, prompts, [], settings, Execution("cpu")
    )
    model = run.transformers_model()
    for prompt, response in zip(prompts, found, strict=True):
        tokens = [*prompt]
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert response == tokens[len(prompt) :]
