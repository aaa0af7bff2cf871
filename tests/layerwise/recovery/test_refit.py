"""The refit is a least-squares fit of the remaining weights, one row at a time."""

from itertools import pairwise

import pytest
import torch

from layerwise.models.hidden_states import batches
from layerwise.models.skeleton import Linear
from layerwise.recovery import refit
from layerwise.recovery.pruned_layer import weights_replaced
from layerwise.recovery.refit import Moments, Refit, converted, refit_layer, refitted

EXACT = {"damping": 0, "steps": 200}
TOKENS, IN_FEATURES, OUT_FEATURES = 40, 6, 3


@pytest.fixture
def problem():
    """Return a dense weight, a mask, inputs in the pruned model, and inputs in the dense model."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES, generator=generator)
    mask = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1]], dtype=torch.bool)
    mixing = torch.randn(IN_FEATURES, IN_FEATURES, generator=generator)  # so that features are correlated
    inputs = torch.randn(TOKENS, IN_FEATURES, generator=generator) @ mixing
    dense_inputs = inputs + 0.3 * torch.randn(inputs.shape, generator=generator)
    return weight, mask, inputs, dense_inputs


def moments_of(inputs, dense_inputs=None, alpha=0.0, outputs=IN_FEATURES) -> Moments:
    linear = Linear("linear", outputs, inputs.shape[-1], transposed=False)
    moments = Moments.empty([linear], alpha, torch.device("cpu"))
    moments.add(inputs, dense_inputs)
    return moments


def least_squares(inputs, target, mask):
    """Fit each row of a weight to its column of the target with the entries that the mask leaves."""
    weight = torch.zeros(mask.shape)
    for row, removed in enumerate(mask):
        weight[row, ~removed] = torch.linalg.lstsq(inputs[:, ~removed], target[:, row]).solution
    return weight


def test_without_pruned_weights_nothing_changes(problem):
    weight, mask, inputs, _ = problem
    prepared = moments_of(inputs).prepare(damping=0.01)
    assert torch.equal(refitted(weight, weight, torch.zeros_like(mask), prepared, steps=8), weight)


def test_with_enough_steps_each_row_is_the_least_squares_solution_on_its_remaining_entries(problem):
    weight, mask, inputs, _ = problem
    fitted = refitted(weight, weight.masked_fill(mask, 0), mask, moments_of(inputs).prepare(0), steps=200)
    torch.testing.assert_close(fitted, least_squares(inputs, inputs @ weight.T, mask), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_alpha_mixes_the_outputs_on_the_inputs_of_the_pruned_and_of_the_dense_model(problem, alpha):
    weight, mask, inputs, dense_inputs = problem
    target = (1 - alpha) * inputs @ weight.T + alpha * dense_inputs @ weight.T
    of_inputs = moments_of(inputs, dense_inputs, alpha).prepare(0)
    of_outputs = moments_of(inputs, dense_inputs @ weight.T, alpha, outputs=OUT_FEATURES).prepare(0)
    assert (of_inputs.moments.of_outputs, of_outputs.moments.of_outputs) == (False, True)
    for prepared in (of_inputs, of_outputs):
        fitted = refitted(weight, weight.masked_fill(mask, 0), mask, prepared, steps=200)
        torch.testing.assert_close(fitted, least_squares(inputs, target, mask), rtol=1e-3, atol=1e-4)


def test_every_step_lowers_the_error(problem):
    weight, mask, inputs, _ = problem
    pruned = weight.masked_fill(mask, 0)
    prepared = moments_of(inputs).prepare(0)
    fitted = [pruned, *(refitted(weight, pruned, mask, prepared, steps) for steps in (1, 2, 3))]
    errors = [float((inputs @ (each - weight).T).square().sum()) for each in fitted]
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_removed_weights_stay_exactly_zero_and_the_arguments_unchanged(problem):
    weight, mask, inputs, _ = problem
    pruned = weight.masked_fill(mask, 0)
    before = pruned.clone()
    fitted = refitted(weight, pruned, mask, moments_of(inputs).prepare(0.01), steps=8)
    assert torch.equal(fitted == 0, mask)
    assert torch.equal(pruned, before)


def test_damping_pulls_towards_the_pruned_weight(problem):
    weight, mask, inputs, _ = problem
    pruned = weight.masked_fill(mask, 0)
    distances = [
        float((refitted(weight, pruned, mask, moments_of(inputs).prepare(damping), 200) - pruned).norm())
        for damping in (0, 1, 100, 1e6)
    ]
    assert all(later < earlier for earlier, later in pairwise(distances))
    assert distances[-1] < 1e-4


def test_rows_that_are_fitted_in_blocks_are_the_same(problem, monkeypatch):
    weight, mask, inputs, _ = problem
    pruned, prepared = weight.masked_fill(mask, 0), moments_of(inputs).prepare(0.01)
    together = refitted(weight, pruned, mask, prepared, steps=8)
    monkeypatch.setattr("layerwise.recovery.refit.REFITTED_ENTRIES", 2 * IN_FEATURES)
    torch.testing.assert_close(refitted(weight, pruned, mask, prepared, steps=8), together)


def test_an_input_that_is_always_zero_does_not_matter(problem):
    weight, mask, inputs, _ = problem
    inputs[:, 2] = 0
    pruned = weight.masked_fill(mask, 0)
    fitted = refitted(weight, pruned, mask, moments_of(inputs).prepare(0), steps=8)
    assert torch.equal(fitted[:, 2], pruned[:, 2])
    assert torch.isfinite(fitted).all()


def test_moments_do_not_depend_on_how_tokens_are_batched(problem):
    _, _, inputs, dense_inputs = problem
    together, apart = moments_of(inputs, dense_inputs, 0.25), moments_of(inputs[:7], dense_inputs[:7], 0.25)
    apart.add(inputs[7:].reshape(3, 11, IN_FEATURES), dense_inputs[7:].reshape(3, 11, IN_FEATURES))
    torch.testing.assert_close(apart.gram, together.gram)
    torch.testing.assert_close(apart.cross, together.cross)


def test_a_weight_too_small_for_float16_does_not_become_a_zero():
    weight = torch.tensor([[1e-9, -1e-9, 0.0, 0.5]])
    assert converted(weight, torch.float16).tolist() == [[2**-14, -(2**-14), 0.0, 0.5]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "opt"])
def test_linears_are_refitted_on_the_inputs_that_the_refitted_ones_before_them_give(
    pruned_layer, inputs_of_linears, family
):
    """Only then is each linear the least-squares solution for its inputs in the refitted layer."""
    pruned = pruned_layer(family)
    alpha = 0.25
    fitted = refit_layer(pruned, Refit(alpha=alpha, **EXACT))[0]
    assert fitted.keys() == {each.linear.name for each in pruned.linears}
    with weights_replaced(pruned.layer, fitted):
        inputs = inputs_of_linears(pruned, pruned.hidden_states[:-1])  # the last window is held out
    with weights_replaced(pruned.layer, pruned.dense_weights):
        dense_inputs = inputs_of_linears(pruned, pruned.dense_states[:-1])
    for each in pruned.linears:
        name, oriented = each.linear.name, each.linear.oriented
        weight, mask = oriented(each.dense), oriented(each.mask)
        target = (1 - alpha) * inputs[name] @ weight.T + alpha * dense_inputs[name] @ weight.T
        best = (inputs[name] @ least_squares(inputs[name], target, mask).T - target).square().sum()
        reached = (inputs[name] @ oriented(fitted[name]).T - target).square().sum()
        pruned_error = (inputs[name] @ weight.masked_fill(mask, 0).T - target).square().sum()
        assert float(reached) == pytest.approx(float(best), rel=0.01)
        assert reached < 0.9 * pruned_error
        assert torch.equal(fitted[name] == 0, each.mask)


@pytest.mark.parametrize(
    "family, passes",
    [(family, 0) for family in ("llama", "phi3", "opt", "gpt-neox", "gpt2", "falcon")]
    + [
        (family, 2) for family in ("gemma2-window", "bloom", "qwen3")
    ],  # the last input cannot be found, or is too wide
)
def test_attention_is_computed_only_up_to_its_last_linear(pruned_layer, family, passes, monkeypatch):
    pruned = pruned_layer(family, torch.bfloat16, windows=600)  # 525 are fitted on, in three batches
    attention = next(child for child in pruned.layer.children() if type(child).__name__.endswith("Attention"))
    compute, finished = type(attention).forward, []

    def counted(*args, **kwargs):
        output = compute(*args, **kwargs)
        finished.append(len(output[0]))
        return output

    monkeypatch.setattr(type(attention), "forward", counted)
    fitted = refit_layer(pruned, Refit())[0]
    assert len(finished) == 2 + passes * 6  # two passes with one window to find the order
    monkeypatch.setattr(refit, "find_first_block", lambda pruned: None)
    computed = refit_layer(pruned, Refit())[0]
    assert fitted.keys() == computed.keys()
    assert all(torch.equal(fitted[name], computed[name]) for name in fitted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family, changes",
    [
        (
            "llama",
            {"attention_bias": True, "head_dim": 4},
        ),  # the last linear's input is narrower than the hidden states
        ("recurrent-gemma", {}),  # the input of the last linear of a recurrent block is not contiguous
        ("opt", {"exclude": "self_attn"}),  # the first linear is not in a submodule
    ],
)
def test_a_kept_input_gives_the_same_bits(pruned_layer, family, changes, dtype):
    """Also in the pass after the refit, which an interrupted run computes without kept inputs."""
    pruned = pruned_layer(family, dtype, windows=600, **changes)
    fitted, inputs = refit_layer(pruned, Refit())
    with weights_replaced(pruned.layer, fitted):
        for number, states in enumerate(batches(pruned.hidden_states)):
            with inputs.from_kept(number, len(states)):
                shortened = pruned.run(states)
            assert torch.equal(shortened, pruned.run(states))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_weights_have_the_dtype_of_the_checkpoint_and_the_layer_is_unchanged(pruned_layer, stored):
    pruned = pruned_layer("gpt2", torch.bfloat16, stored)
    before = {name: tensor.clone() for name, tensor in pruned.layer.state_dict().items()}
    fitted = refit_layer(pruned, Refit())[0]
    assert {weight.dtype for weight in fitted.values()} == {stored}
    assert all(weight.is_contiguous() for weight in fitted.values())
    after = pruned.layer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"alpha": -0.1}, "alpha is -0.1; it must be from 0 to 1"),
        ({"alpha": 1.1}, "alpha is 1.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"steps": 0}, "steps is 0; it must be from 1"),
        ({"steps": 1001}, "steps is 1001"),
        ({"damping": -1.0}, "damping is -1; it must be 0 or more"),
        ({"damping": float("inf")}, "damping is inf"),
        ({"held_out": 0.0}, "held_out is 0; it must be between 0 and 1"),
        ({"held_out": 1.0}, "held_out is 1;"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Refit(**settings)
