"""Block-wise training moves the remaining weights towards the dense layer's output, and keeps the best it has seen."""

import pytest
import torch

from layerwise.recovery.pruned_layer import relative_errors
from layerwise.recovery.refit import Refit, refit_layer
from layerwise.recovery.train import Train, learning_rate_share, train_layer

MANY = 64  # windows, so that the held-out ones are not much worse than the others
HELD_OUT = 8


def same(weights, others) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(weights[n], others[n]) for n in weights)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2-window", "falcon", "opt", "recurrent-gemma"])
def test_training_lowers_the_error_below_that_of_the_refit(pruned_layer, family):
    pruned = pruned_layer(family, windows=MANY)
    fitted = refit_layer(pruned, Refit(alpha=0))[0]
    trained = train_layer(pruned, fitted, Train())
    errors = relative_errors(pruned, [{}, fitted, trained], 0.0, HELD_OUT)
    assert errors[2] < errors[1] < errors[0]
    for each in pruned.linears:
        assert torch.equal(trained[each.linear.name] == 0, each.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_lowers_the_error_in_every_dtype(pruned_layer, dtype):
    pruned = pruned_layer("llama", dtype, windows=MANY)
    trained = train_layer(pruned, {}, Train())
    assert {weight.dtype for weight in trained.values()} == {dtype}
    assert (
        relative_errors(pruned, [trained], 0.0, HELD_OUT)[0]
        < 0.95 * relative_errors(pruned, [{}], 0.0, HELD_OUT)[0]
    )


def test_weights_have_the_dtype_of_the_checkpoint(pruned_layer):
    trained = train_layer(pruned_layer("gpt2", torch.bfloat16, torch.float32), {}, Train())
    assert {weight.dtype for weight in trained.values()} == {torch.float32}


def test_a_step_is_a_fraction_of_the_size_of_the_remaining_weights(pruned_layer):
    """Adam's first step changes every weight by the learning rate."""
    pruned = pruned_layer("llama", windows=2)
    trained = train_layer(pruned, {}, Train(learning_rate=0.01, epochs=1, warm_up=0))
    for each in pruned.linears:
        change = trained[each.linear.name] - each.dense
        size = each.dense[~each.mask].square().mean().sqrt()
        torch.testing.assert_close(change[~each.mask].abs(), (0.01 * size).expand(int((~each.mask).sum())))


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine():
    shares = [learning_rate_share(step, 12, warm_up=0.34) for step in range(13)]
    assert shares[:4] == pytest.approx([1 / 4.08, 2 / 4.08, 3 / 4.08, 4 / 4.08])
    assert shares[4] == 1
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert [learning_rate_share(step, 8, warm_up=0) for step in (0, 4, 8)] == pytest.approx([1, 0.5, 0])


def test_weights_that_training_makes_worse_are_not_used(pruned_layer):
    pruned = pruned_layer()
    fitted = refit_layer(pruned, Refit())[0]
    assert train_layer(pruned, fitted, Train(learning_rate=0.9)) is fitted


def test_results_are_the_same_bytes_and_depend_on_the_seed(pruned_layer):
    pruned = pruned_layer(windows=MANY)
    first = train_layer(pruned, {}, Train())
    assert same(train_layer(pruned, {}, Train()), first)
    assert not same(train_layer(pruned, {}, Train(seed=1)), first)


def test_training_does_not_change_the_layer_nor_the_random_numbers_of_the_process(pruned_layer):
    pruned = pruned_layer("gpt2")
    fitted = refit_layer(pruned, Refit())[0]
    before = {name: tensor.clone() for name, tensor in pruned.layer.state_dict().items()}
    start = {name: tensor.clone() for name, tensor in fitted.items()}
    states, random_state = pruned.hidden_states.clone(), torch.get_rng_state()
    train_layer(pruned, fitted, Train())
    assert same(pruned.layer.state_dict(), before)
    assert same(fitted, start)
    assert torch.equal(pruned.hidden_states, states)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in pruned.layer.parameters())


def test_the_settings_of_the_refit_are_passed_on():
    settings = Train(alpha=0.5, steps=3, damping=0.1, held_out=0.25)
    assert settings.refit == Refit(alpha=0.5, steps=3, damping=0.1, held_out=0.25)
    assert Train().refit == Refit()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"alpha": 2.0}, "alpha is 2; it must be from 0 to 1"),
        ({"held_out": 0.0}, "held_out is 0;"),
        ({"epochs": 0}, "epochs is 0; it must be from 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0; it must be between 0 and 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warm_up": 1.0}, "warm_up is 1; it must be 0 or more and less than 1"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Train(**settings)
