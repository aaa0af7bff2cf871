"""Sequential calibration: lanes calibrate on their own hidden states, as in the official Wanda code."""

import pytest
import torch

from layerwise.calibration.capture import embed_windows
from layerwise.lanes import Lane, LaneGroup
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.wanda import Wanda

pytestmark = pytest.mark.usefixtures("two_windows_at_a_time")

SPARSITIES = (0.25, 0.5, 0.625, 0.75)  # gives integer counts for all inputs of the small models
CALIBRATION = 3  # windows, followed by 5 scored windows


@pytest.fixture
def windows(random_windows_of) -> torch.Tensor:
    return torch.cat([random_windows_of(CALIBRATION, seed=7), random_windows_of(5)])


@pytest.fixture
def embedded(windows):
    """Return a streamed model and lanes with the input of its first layer."""

    def embed(tiny, plans, dtype=torch.float32):
        model, hidden_states = tiny.streamed(dtype), torch.empty(8, 16, 32, dtype=dtype)
        embed_windows(model, windows, hidden_states, CALIBRATION)
        return model, [Lane(removed, hidden_states.clone()) for removed in (None, *plans)]

    return embed


@pytest.fixture
def advance(embedded):
    """Advance lanes through a whole model; return the lanes and the results of each layer."""

    def run(tiny, plans, pruner=None, dtype=torch.float32):
        model, lanes = embedded(tiny, plans, dtype)
        group = LaneGroup(model, lanes, pruner or Wanda(), None, CALIBRATION)
        return lanes, list(group.advance(tiny.layers()))

    return run


def removed_of(tiny, sparsities) -> tuple[tuple[int, ...], ...]:
    layers = zip(sparsities, tiny.streamed().linears, strict=True)
    return tuple(tuple(round(sparsity * linear.numel) for linear in linears) for sparsity, linears in layers)


def sequential_wanda(tiny, calibration, sparsities, linear_inputs, published_wanda_mask):
    """Prune the reference in place: calibrate each layer on its inputs after the pruned layers, then prune it."""
    masks = []
    for index, sparsity in enumerate(sparsities):
        layer_name = f"{tiny.layers_name}.{index}"
        masks.append({})
        inputs = linear_inputs(tiny.reference, layer_name, calibration)
        for linear in tiny.streamed().linears[index]:
            module = tiny.reference.get_submodule(f"{layer_name}.{linear.name}")
            weight = module.weight.T if linear.transposed else module.weight
            mask = published_wanda_mask(weight, inputs[linear.name], sparsity)
            weight[mask] = 0
            masks[-1][linear.name] = mask
    return masks


@pytest.mark.parametrize("sparsities", [SPARSITIES, (0.5,) * 4, SPARSITIES[::-1]])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma4"])
def test_masks_are_those_of_the_published_sequential_wanda(
    tiny_model, windows, layer_outputs, linear_inputs, published_wanda_mask, advance, family, sparsities
):
    tiny = tiny_model(family)
    removed = removed_of(tiny, sparsities)
    others = [removed_of(tiny, (0.5, 0.25, 0.75, 0.5)), removed]
    lanes, outcomes = advance(tiny, others)
    layers = tiny.layers()
    masks = sequential_wanda(tiny, windows[:CALIBRATION], sparsities, linear_inputs, published_wanda_mask)
    agreeing = total = 0
    for index, weights in enumerate(layers):
        for linear, count in zip(tiny.streamed().linears[index], removed[index], strict=True):
            weight = linear.oriented(weights[linear.weight_name])
            inputs = lanes[2].statistics[index][linear.name]
            mask = Wanda().removal_levels(weight, inputs, [count]) == 0
            agreeing += int((mask == masks[index][linear.name]).sum())
            total += linear.numel
    assert agreeing >= 0.999 * total
    assert [outcome[2].zeros for outcome in outcomes] == list(removed)
    expected = layer_outputs(tiny.reference, tiny.layers_name, windows)[-1]
    torch.testing.assert_close(lanes[2].hidden_states, expected, rtol=1e-4, atol=1e-3)


def test_calibrating_on_a_lanes_own_states_differs_from_calibrating_on_the_dense_ones(tiny_model, advance):
    tiny = tiny_model()
    plan = removed_of(tiny, SPARSITIES)
    lanes, _ = advance(tiny, [plan, removed_of(tiny, [0.0] * 4)])
    pruned, dense = lanes[1].statistics, lanes[2].statistics
    assert torch.equal(pruned[0]["self_attn.q_proj"].norms, dense[0]["self_attn.q_proj"].norms)
    assert not torch.allclose(
        pruned[3]["self_attn.q_proj"].norms, dense[3]["self_attn.q_proj"].norms, rtol=0.01
    )


def test_statistics_include_only_the_calibration_windows(tiny_model, advance):
    tiny = tiny_model()
    lanes, _ = advance(tiny, [removed_of(tiny, SPARSITIES)])
    assert lanes[0].statistics == []
    assert len(lanes[1].statistics) == 4
    assert {s.tokens for layer in lanes[1].statistics for s in layer.values()} == {CALIBRATION * 16}


def test_errors_include_only_the_scored_windows(tiny_model, windows, layer_outputs, advance):
    tiny = tiny_model()
    removed = removed_of(tiny, SPARSITIES)
    _, outcomes = advance(tiny, [removed], Magnitude())
    dense = layer_outputs(tiny.reference, tiny.layers_name, windows[CALIBRATION:])
    for index, counts in enumerate(removed):
        for linear, count in zip(tiny.streamed().linears[index], counts, strict=True):
            weight = tiny.reference.get_submodule(f"{tiny.layers_name}.{index}.{linear.name}").weight
            weight[weight.abs() <= weight.abs().flatten().kthvalue(count).values] = 0
    pruned = layer_outputs(tiny.reference, tiny.layers_name, windows[CALIBRATION:])
    for index, outcome in enumerate(outcomes):
        error = float((pruned[index] - dense[index]).double().square().sum())
        assert outcome[1].error == pytest.approx(error, rel=1e-3)
        assert outcome[1].energy == pytest.approx(float(dense[index].double().square().sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_pruning_of_a_lane_does_not_affect_the_others(tiny_model, advance, family, dtype):
    tiny = tiny_model(family)
    plans = [
        removed_of(tiny, sparsities) for sparsities in ([0.75] * 4, SPARSITIES, [0.0] * 4, SPARSITIES[::-1])
    ]
    lanes, outcomes = advance(tiny, plans, dtype=dtype)
    assert torch.equal(lanes[3].hidden_states, lanes[0].hidden_states)
    assert [outcome[3].error for outcome in outcomes] == [0] * 4
    for number, plan in enumerate(plans, 1):
        alone, outcomes_alone = advance(tiny, [plan], dtype=dtype)
        assert torch.equal(alone[1].hidden_states, lanes[number].hidden_states)
        assert [outcome[1] for outcome in outcomes_alone] == [outcome[number] for outcome in outcomes]
        for layer, layer_alone in zip(lanes[number].statistics, alone[1].statistics, strict=True):
            assert all(torch.equal(layer[n].sum_of_squares, layer_alone[n].sum_of_squares) for n in layer)


def test_resuming_in_the_middle_gives_the_bytes_of_an_uninterrupted_run(tiny_model, embedded, advance):
    tiny = tiny_model("mistral-window")
    plans = [removed_of(tiny, SPARSITIES), removed_of(tiny, SPARSITIES[::-1])]
    undisturbed, outcomes = advance(tiny, plans)
    model, lanes = embedded(tiny, plans)
    interrupted = LaneGroup(model, lanes, Wanda(), None, CALIBRATION).advance(tiny.layers())
    before = [next(interrupted), next(interrupted)]
    saved = [Lane(lane.removed, lane.hidden_states.clone()) for lane in lanes]
    resumed = LaneGroup(tiny.streamed(), saved, Wanda(), None, CALIBRATION)
    after = list(resumed.advance(tiny.layers(2), 2))
    assert before + after == outcomes
    for lane, other in zip(saved, undisturbed, strict=True):
        assert torch.equal(lane.hidden_states, other.hidden_states)
    for lane, other in zip(saved[1:], undisturbed[1:], strict=True):
        for layer, layer_before in zip(lane.statistics, other.statistics[2:], strict=True):
            assert all(torch.equal(layer[n].sum_of_squares, layer_before[n].sum_of_squares) for n in layer)
