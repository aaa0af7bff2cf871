"""A recovered layer is used only if it is better on calibration windows that it was not fitted on."""

from dataclasses import replace

import pytest
import torch

from layerwise.recovery.layer_recovery import RecoveryOutcome, recover_layer
from layerwise.recovery.pruned_layer import LayerToRecover, relative_errors
from layerwise.recovery.refit import Refit, refit_layer
from layerwise.recovery.train import Train

HELD_OUT = 1  # of 8 windows


@pytest.fixture
def unrelated():
    """Replace the dense hidden states by random ones, so that fitting to the dense outputs fits noise."""

    def scramble(pruned):
        generator = torch.Generator().manual_seed(9)
        return replace(pruned, dense_states=torch.randn(pruned.dense_states.shape, generator=generator))

    return scramble


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2-window"])
def test_a_refit_reports_the_errors_on_the_held_out_windows(pruned_layer, family):
    pruned = pruned_layer(family)
    settings = Refit(alpha=0.25)
    recovered = recover_layer(pruned, settings)
    weights, outcome = recovered.weights, recovered.outcome
    assert outcome.before == relative_errors(pruned, [{}], 0.25, HELD_OUT)[0]
    assert outcome.after == relative_errors(pruned, [weights], 0.25, HELD_OUT)[0]
    assert outcome.accepted
    fitted = refit_layer(pruned, settings)[0]
    assert all(torch.equal(weights[name], fitted[name]) for name in fitted)


def test_an_overfitted_layer_is_not_accepted(pruned_layer, unrelated):
    pruned = unrelated(pruned_layer(windows=3))
    recovered = recover_layer(pruned, Refit(alpha=1, damping=0, steps=100))
    weights, outcome = recovered.weights, recovered.outcome
    assert weights == {}
    assert outcome.after > outcome.before
    assert not outcome.accepted


def test_training_starts_from_the_pruned_weights_if_the_refit_is_worse(pruned_layer, unrelated):
    """A step of 1e-6 of the weights cannot leave the neighbourhood of its start."""
    pruned = unrelated(pruned_layer(windows=3))
    settings = Train(alpha=1, damping=0, steps=100, learning_rate=1e-6, epochs=1)
    recovered = recover_layer(pruned, settings)
    weights, outcome = recovered.weights, recovered.outcome
    assert outcome.after <= outcome.before
    for each in pruned.linears:
        start = each.dense.masked_fill(each.mask, 0)
        torch.testing.assert_close(weights.get(each.linear.name, start), start, rtol=0, atol=1e-4)


def test_a_trained_layer_is_better_than_a_refitted_one(pruned_layer):
    pruned = pruned_layer(windows=64)
    fitted = recover_layer(pruned, Refit(alpha=0)).weights
    recovered = recover_layer(pruned, Train(alpha=0, learning_rate=0.01))
    trained, outcome = recovered.weights, recovered.outcome
    assert outcome.accepted
    assert outcome.after == relative_errors(pruned, [trained], 0.0, held_out=8)[0]
    assert outcome.after < relative_errors(pruned, [fitted], 0.0, held_out=8)[0]


@pytest.mark.parametrize(
    ("settings", "family"),
    [(Refit(), "llama"), (Train(epochs=1), "llama"), (Refit(), "qwen3-moe"), (Refit(), "gpt-oss")],
)
def test_recovery_on_the_first_tokens_is_that_on_shorter_windows(pruned_layer, settings, family):
    """Attention is causal, so the other tokens do not change the first ones. All ones give the bits of no mask."""
    pruned, first = pruned_layer(family, windows=32), 7

    def shortened(states):
        return states[:, :first].contiguous()

    counted = torch.zeros(pruned.hidden_states.shape[:2], dtype=torch.bool)
    counted[:, :first] = True
    masked = recover_layer(replace(pruned, counted=counted), settings)
    streams = shortened(pruned.hidden_states), shortened(pruned.dense_states)
    rooms = tuple(map(shortened, pruned.rooms))
    shorter = recover_layer(
        LayerToRecover(pruned.model, 1, pruned.layer, pruned.linears, *streams, rooms), settings
    )
    whole = recover_layer(pruned, settings)
    everything = recover_layer(replace(pruned, counted=torch.ones_like(counted)), settings)
    assert (masked.outcome.before, masked.outcome.after) == pytest.approx(
        (shorter.outcome.before, shorter.outcome.after), rel=1e-3
    )
    assert everything.outcome == whole.outcome
    for name, weight in masked.weights.items():
        torch.testing.assert_close(weight, shorter.weights[name], rtol=1e-2, atol=1e-4)
        assert not torch.equal(weight, whole.weights[name])
        assert torch.equal(everything.weights[name], whole.weights[name])


@pytest.mark.parametrize("settings", [Refit(), Train()])
def test_recovery_needs_windows_to_fit_on(pruned_layer, settings):
    with pytest.raises(ValueError, match="holds 1 of 1 calibration windows out"):
        recover_layer(pruned_layer(windows=1), settings)


def test_equal_errors_keep_the_pruned_weights():
    assert RecoveryOutcome(0.5, 0.4).accepted
    assert not RecoveryOutcome(0.5, 0.5).accepted
    assert not RecoveryOutcome(0.5, float("nan")).accepted
