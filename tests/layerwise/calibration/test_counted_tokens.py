"""Masks of tokens that count: with causal attention, a mask of the first tokens is the same as shorter windows."""

import pytest
import torch
from torch import nn

from layerwise.calibration.capture import capture_grams, capture_layers
from layerwise.calibration.counted_tokens import counted_rows, predicting
from layerwise.calibration.gram import collect_grams
from layerwise.calibration.statistics import collect_statistics
from layerwise.models.experts import counted_by
from layerwise.models.hidden_states import batches
from layerwise.models.skeleton import Linear
from layerwise.scoring.perplexity import window_losses

FIRST = 5  # tokens that count in every window


def first_tokens(states):
    counted = torch.zeros(states.shape[:2], dtype=torch.bool)
    counted[:, :FIRST] = True
    return counted


@pytest.fixture(params=["llama", "qwen3-moe", "gpt-oss"])
def passes(request, tiny_model):
    """Return a function that runs the model over hidden states, and returns all sums and counts of tokens."""
    tiny = tiny_model(request.param)
    model = tiny.streamed()

    def run(states, counted=None):
        layers = [capture_layers(model, tiny.layers(), states.clone(), len(states), 0, counted)]
        layers.append(capture_grams(model, tiny.layers(), states.clone(), 0, counted))
        statistics, grams = (list(each) for each in layers)
        sums = [each.sum_of_squares for layer in statistics for each in layer.statistics.values()]
        sums += [each.gram for layer in grams for each in layer.values()]
        counts = [each.tokens for layer in statistics for each in layer.statistics.values()]
        return sums, counts + [each.tokens for layer in grams for each in layer.values()]

    return run, model


def test_statistics_and_second_moments_of_the_first_tokens_are_those_of_shorter_windows(passes):
    run, _ = passes
    states = torch.randn(3, 12, 32)
    sums, counts = run(states, first_tokens(states))
    expected, tokens = run(states[:, :FIRST].contiguous())
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)
    assert counts == tokens
    assert (max(counts), counts[0]) == (
        3 * FIRST,
        3 * FIRST,
    )  # attention comes first, and every token reaches it


def test_a_mask_of_all_tokens_gives_the_bits_of_no_mask(passes):
    run, model = passes
    states, input_ids = torch.randn(3, 12, 32), torch.randint(61, (3, 12))
    everything = torch.ones(3, 12, dtype=torch.bool)
    (sums, counts), (expected, tokens) = run(states, everything), run(states)
    assert all(map(torch.equal, sums, expected))
    assert counts == tokens
    assert (max(counts), counts[0]) == (36, 36)
    assert window_losses(model, states, input_ids, everything) == window_losses(model, states, input_ids)


def test_the_loss_on_the_first_tokens_is_that_of_shorter_windows(passes):
    _, model = passes
    states, input_ids = torch.randn(3, 12, 32), torch.randint(61, (3, 12))
    losses = window_losses(model, states, input_ids, first_tokens(states))
    assert losses == pytest.approx(window_losses(model, states[:, :FIRST], input_ids[:, :FIRST]), rel=1e-5)


def test_masked_rows_are_chosen_batch_by_batch():
    """Windows of 3000 tokens are computed one by one."""
    layer, linear = nn.Sequential(nn.Linear(2, 1)), Linear("0", 1, 2, False)
    states, counted = torch.randn(3, 3000, 2), torch.rand(3, 3000) < 0.3
    with (
        collect_statistics(layer, [linear], counted) as statistics,
        collect_grams(layer, [linear], counted) as grams,
    ):
        for some in batches(states):
            layer(some)
    rows = states[counted].double()
    torch.testing.assert_close(statistics["0"].sum_of_squares, rows.square().sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(grams["0"].gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-2)
    assert statistics["0"].tokens == grams["0"].tokens == int(counted.sum())


def test_experts_that_do_not_tell_their_tokens_are_refused():
    layer = nn.Module()
    layer.experts = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(2, 2)})])
    with pytest.raises(ValueError, match="not known which tokens experts.0 received.*--calibrate-on all"):
        counted_by(layer, "experts.0.up_proj", torch.ones(3, 4))


def test_a_linear_that_does_not_receive_every_token_is_refused():
    with pytest.raises(ValueError, match="4 rows for 6 tokens.*--calibrate-on all"):
        counted_rows(torch.zeros(4, 2), torch.ones(2, 3, dtype=torch.bool))


def test_positions_whose_next_token_counts():
    counted = torch.tensor([[False, True, True, False], [True, False, False, True]])
    expected = [[True, True, False, False], [False, False, True, True]]
    assert predicting(counted).tolist() == expected
