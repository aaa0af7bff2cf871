"""The error of a pruned layer, the inputs of its linears, and weights that are replaced for a while."""

import pytest
import torch

from layerwise.recovery.layer_recovery import recover_layer
from layerwise.recovery.linear_inputs import linears_by_input
from layerwise.recovery.pruned_layer import (
    held_out_windows,
    relative_errors,
    target_output,
    weights_replaced,
)
from layerwise.recovery.refit import Refit
from layerwise.recovery.train import Train


@pytest.mark.parametrize(
    "family, groups",
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]),
        ("gpt2", [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
        ("opt", [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
        # Attention and MLP of Falcon are parallel, on the same normalised hidden states.
        ("falcon", [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]]),
    ],
)
def test_linears_are_grouped_by_their_input_in_the_order_of_the_data_flow(pruned_layer, family, groups):
    pruned = pruned_layer(family)
    found = [[name.rpartition(".")[2] for name in names] for names in linears_by_input(pruned)]
    assert [sorted(names) for names in found] == [sorted(names) for names in groups]


def test_the_error_is_relative_to_each_token(pruned_layer):
    """Mean over the tokens of the held-out windows of ``||e||^2 / ||y||^2``."""
    pruned = pruned_layer()
    with weights_replaced(pruned.layer, pruned.dense_weights):
        target = pruned.run(pruned.hidden_states[-2:])
    error = pruned.run(pruned.hidden_states[-2:]) - target
    expected = (error.norm(dim=-1) / target.norm(dim=-1)).square().mean()
    assert relative_errors(pruned, [{}], 0.0, held_out=2)[0] == pytest.approx(float(expected), rel=1e-4)


def test_the_dense_layer_has_no_error_on_its_own_inputs(pruned_layer):
    pruned = pruned_layer()
    assert relative_errors(pruned, [pruned.dense_weights], 0.0, held_out=2) == [0]
    assert relative_errors(pruned, [pruned.dense_weights], 0.5, held_out=2)[0] > 0


def test_the_target_mixes_the_dense_layers_outputs_on_both_hidden_states(pruned_layer):
    pruned = pruned_layer()
    states, dense_states = pruned.hidden_states[:1], pruned.dense_states[:1]
    own, dense = (target_output(pruned, states, dense_states, alpha) for alpha in (0.0, 1.0))
    torch.testing.assert_close(target_output(pruned, states, dense_states, 0.25), 0.75 * own + 0.25 * dense)
    with weights_replaced(pruned.layer, pruned.dense_weights):
        torch.testing.assert_close(dense, pruned.run(dense_states))


def test_replaced_weights_come_back_after_an_error(pruned_layer):
    pruned = pruned_layer()
    name = pruned.linears[0].linear.name
    before = pruned.layer.get_submodule(name).weight.clone()

    def fail_with_ones():
        with weights_replaced(pruned.layer, {name: torch.ones_like(before)}):
            assert pruned.layer.get_submodule(name).weight.sum() == before.numel()
            raise RuntimeError("a pass failed")

    with pytest.raises(RuntimeError, match="a pass failed"):
        fail_with_ones()
    assert torch.equal(pruned.layer.get_submodule(name).weight, before)


def test_at_least_one_window_is_held_out_and_one_is_left():
    assert [held_out_windows(Refit(), windows) for windows in (2, 8, 32, 128)] == [1, 1, 4, 16]
    with pytest.raises(ValueError, match="holds 1 of 1 calibration windows out and has none left"):
        held_out_windows(Refit(), 1)
    with pytest.raises(ValueError, match="holds 9 of 9"):
        held_out_windows(Refit(held_out=0.97), 9)


@pytest.mark.parametrize("settings", [Refit(), Train(epochs=1)], ids=lambda each: each.method)
def test_a_token_whose_target_is_zero_has_no_say(pruned_layer, settings):
    """An all-zero row of the embedding is enough; a layer without biases maps it to zero."""
    pruned = pruned_layer(windows=24)
    for states in (pruned.hidden_states, pruned.dense_states):
        states[[0, -1], 0] = 0
    recovered = recover_layer(pruned, settings)
    weights, outcome = recovered.weights, recovered.outcome
    assert outcome.after < outcome.before < 1
    assert all(weight.isfinite().all() for weight in weights.values())
