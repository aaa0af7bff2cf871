"""Lanes that share one read of the weights give the same result as each lane alone."""

import pytest
import torch

from layerwise.allocators.atp import arithmetic
from layerwise.allocators.sparsity_plan import removed_per_linear
from layerwise.calibration.capture import capture_layers, embed_windows
from layerwise.lanes import Lane, LaneGroup
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.wanda import Wanda

pytestmark = pytest.mark.usefixtures("two_windows_at_a_time")

SPARSITIES = (0.25, 0.5, 0.625, 0.75)  # gives integer counts for all inputs of the small models


@pytest.fixture
def removed_of(tiny_model):
    """Return the numbers of removed weights for one sparsity per layer."""

    def count(tiny, sparsities) -> tuple[tuple[int, ...], ...]:
        layers = zip(sparsities, tiny.streamed().linears, strict=True)
        return tuple(
            tuple(round(sparsity * linear.numel) for linear in linears) for sparsity, linears in layers
        )

    return count


@pytest.fixture
def statistics_of(random_windows_of):
    """Return the input statistics of the dense model, by layer."""

    def capture(tiny, dtype=torch.float32):
        model, input_ids = tiny.streamed(dtype), random_windows_of(4, seed=7)
        hidden_states = torch.empty(4, 16, 32, dtype=dtype)
        embed_windows(model, input_ids, hidden_states, 4)
        return [c.statistics for c in capture_layers(model, tiny.layers(), hidden_states, 4)].__getitem__

    return capture


@pytest.fixture
def advance(random_windows_of, statistics_of):
    """Advance lanes through a whole model with dense calibration; return the lanes and the results of each layer."""

    def run(tiny, plans, pruner=None, dtype=torch.float32, layers=None, local_windows=0):
        model, input_ids = tiny.streamed(dtype), random_windows_of(5)
        hidden_states = torch.empty(5, 16, 32, dtype=dtype)
        embed_windows(model, input_ids, hidden_states, 0)
        lanes = [Lane(removed, hidden_states.clone()) for removed in (None, *plans)]
        statistics = statistics_of(tiny, dtype)
        how = pruner or Wanda(), statistics
        group = LaneGroup(model, lanes, *how, local_windows=local_windows)
        outcomes = list(group.advance(layers or tiny.layers()))
        return lanes, outcomes

    return run


def plans_of_atp(tiny, target=0.6, betas=(0.0, 0.05, 0.1, 0.2)) -> list[tuple[tuple[int, ...], ...]]:
    sizes = [[linear.numel for linear in linears] for linears in tiny.streamed().linears]
    layer_sizes = [sum(layer) for layer in sizes]
    return [removed_per_linear(arithmetic(target, beta, layer_sizes), target, sizes) for beta in betas]


def same(lane, other) -> bool:
    return torch.equal(lane.hidden_states, other.hidden_states)


def prune_reference(tiny, removed, masks_of) -> None:
    """Zero weights of the reference layer by layer; ``masks_of`` returns the mask for a layer, linear and weight."""
    for index, (counts, linears) in enumerate(zip(removed, tiny.streamed().linears, strict=True)):
        for linear, count in zip(linears, counts, strict=True):
            module = tiny.reference.get_submodule(f"{tiny.layers_name}.{index}.{linear.name}")
            weight = module.weight.T if linear.transposed else module.weight
            weight[masks_of(index, linear.name, weight, count)] = 0


@pytest.mark.parametrize("family", ["llama", "gemma2-window", "gpt2", "bloom"])
def test_the_dense_lane_is_the_dense_model(tiny_model, random_windows_of, layer_outputs, advance, family):
    tiny = tiny_model(family)
    lanes, outcomes = advance(tiny, plans_of_atp(tiny))
    expected = layer_outputs(tiny.reference, tiny.layers_name, random_windows_of(5))
    torch.testing.assert_close(lanes[0].hidden_states, expected[-1], rtol=1e-5, atol=1e-4)
    for outcome, output in zip(outcomes, expected, strict=True):
        assert outcome[0].error == 0
        assert outcome[0].energy == pytest.approx(float(output.square().sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lane_with_nothing_removed_is_the_dense_lane(tiny_model, removed_of, advance, dtype):
    tiny = tiny_model()
    pruned = plans_of_atp(tiny)[0]
    nothing = removed_of(tiny, [0.0] * 4)
    lanes, outcomes = advance(tiny, [pruned, nothing, pruned], dtype=dtype)
    assert same(lanes[2], lanes[0])
    assert not same(lanes[1], lanes[0])
    assert all(outcome[2] == outcome[0] for outcome in outcomes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "gemma4", "recurrent-gemma"])
def test_a_wanda_lane_is_the_model_pruned_by_the_published_definition(
    tiny_model,
    random_windows_of,
    layer_outputs,
    linear_inputs,
    published_wanda_mask,
    removed_of,
    advance,
    family,
):
    """GPT-2 stores output features as columns; in Gemma-4 and RecurrentGemma the layers have different linears."""
    tiny = tiny_model(family)
    removed = removed_of(tiny, SPARSITIES)
    lanes, outcomes = advance(tiny, [removed])
    calibration = random_windows_of(4, seed=7)
    inputs = [linear_inputs(tiny.reference, f"{tiny.layers_name}.{i}", calibration) for i in range(4)]
    prune_reference(
        tiny,
        removed,
        lambda index, name, weight, _: published_wanda_mask(weight, inputs[index][name], SPARSITIES[index]),
    )
    expected = layer_outputs(tiny.reference, tiny.layers_name, random_windows_of(5))[-1]
    torch.testing.assert_close(lanes[1].hidden_states, expected, rtol=1e-5, atol=1e-4)
    assert [outcome[1].zeros for outcome in outcomes] == list(removed)


def test_a_magnitude_lane_is_the_model_without_its_smallest_weights(
    tiny_model, random_windows_of, layer_outputs, removed_of, advance
):
    tiny = tiny_model("gpt2")
    removed = removed_of(tiny, SPARSITIES)
    lanes, _ = advance(tiny, [removed], Magnitude())
    prune_reference(
        tiny,
        removed,
        lambda _i, _n, weight, count: weight.abs() <= weight.abs().flatten().kthvalue(count).values,
    )
    expected = layer_outputs(tiny.reference, tiny.layers_name, random_windows_of(5))[-1]
    torch.testing.assert_close(lanes[1].hidden_states, expected, rtol=1e-5, atol=1e-4)


def test_errors_compare_each_lanes_own_states_with_the_dense_ones(
    tiny_model, random_windows_of, layer_outputs, removed_of, advance
):
    tiny = tiny_model()
    removed = removed_of(tiny, SPARSITIES)
    _, outcomes = advance(tiny, [removed], Magnitude())
    dense = layer_outputs(tiny.reference, tiny.layers_name, random_windows_of(5))
    prune_reference(
        tiny,
        removed,
        lambda _i, _n, weight, count: weight.abs() <= weight.abs().flatten().kthvalue(count).values,
    )
    pruned = layer_outputs(tiny.reference, tiny.layers_name, random_windows_of(5))
    for index, outcome in enumerate(outcomes):
        error = float((pruned[index] - dense[index]).double().square().sum())
        assert outcome[1].error == pytest.approx(error, rel=1e-3)
        assert outcome[1].energy == outcome[0].energy
        assert outcome[1].energy == pytest.approx(float(dense[index].double().square().sum()), rel=1e-4)


def test_measuring_local_errors_does_not_change_the_lanes(tiny_model, advance):
    """The error that arrives at a layer is the accumulated error of the layer before; the first layer has none."""
    tiny = tiny_model("llama")
    plans = plans_of_atp(tiny)
    plain, undisturbed = advance(tiny, plans)
    lanes, outcomes = advance(tiny, plans, local_windows=3)
    for lane, other in zip(lanes, plain, strict=True):
        assert torch.equal(lane.hidden_states, other.hidden_states)
    for layers, others in zip(outcomes, undisturbed, strict=True):
        assert [(each.error, each.zeros) for each in layers] == [(each.error, each.zeros) for each in others]
        assert layers[0].parts is None
    for lane in range(1, len(plans) + 1):
        parts = [layers[lane].parts for layers in outcomes]
        assert parts[0].arriving == 0
        assert parts[0].local == parts[0].accumulated > 0
        assert [part.arriving for part in parts[1:]] == [part.accumulated for part in parts[:-1]]
        assert {part.windows for part in parts} == {3}


def test_over_all_windows_the_accumulated_local_error_is_the_error(tiny_model, advance):
    tiny = tiny_model("llama")
    _, outcomes = advance(tiny, plans_of_atp(tiny), local_windows=5)
    for layers in outcomes:
        for layer in layers[1:]:
            assert layer.parts.accumulated == pytest.approx(layer.error, rel=1e-6)
            assert layer.parts.energy == pytest.approx(layer.energy, rel=1e-6)


def test_the_local_error_of_a_layer_grows_with_its_sparsity(tiny_model, advance, removed_of):
    """ATP, theorem 3.1, on nested masks."""
    tiny = tiny_model("llama")
    depth = len(tiny.streamed().linears)
    plans = [removed_of(tiny, (sparsity,) * depth) for sparsity in SPARSITIES]
    _, outcomes = advance(tiny, plans, local_windows=5)
    for layers in outcomes:
        own = [layer.parts.local for layer in layers[1:]]
        assert own == sorted(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pruner", [Wanda(), Magnitude()])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lane_group_gives_the_same_bytes_as_each_lane_alone(tiny_model, advance, family, pruner, dtype):
    tiny = tiny_model(family)
    plans = plans_of_atp(tiny)
    lanes, outcomes = advance(tiny, plans, pruner, dtype)
    for number, plan in enumerate(plans, 1):
        alone, outcomes_alone = advance(tiny, [plan], pruner, dtype)
        assert same(alone[0], lanes[0])
        assert same(alone[1], lanes[number])
        assert [outcome[1] for outcome in outcomes_alone] == [outcome[number] for outcome in outcomes]
    assert not same(lanes[1], lanes[2])


def test_the_order_of_the_lanes_does_not_matter(tiny_model, advance):
    tiny = tiny_model()
    plans = plans_of_atp(tiny)
    lanes, outcomes = advance(tiny, plans)
    shuffled, shuffled_outcomes = advance(tiny, [plans[number] for number in (2, 0, 3, 1)])
    for place, number in enumerate((2, 0, 3, 1), 1):
        assert same(shuffled[place], lanes[number + 1])
        assert [o[place] for o in shuffled_outcomes] == [o[number + 1] for o in outcomes]


def test_two_lanes_with_the_same_plan_are_equal(tiny_model, advance):
    tiny = tiny_model()
    plan = plans_of_atp(tiny)[1]
    lanes, _ = advance(tiny, [plan, plan])
    assert same(lanes[1], lanes[2])


def test_lanes_of_equal_layer_sparsity_may_remove_weights_in_opposite_order(tiny_model, advance):
    """Rounding can move one weight between linears of two lanes; here it is a hundred, at the same layer sparsity."""
    tiny = tiny_model()
    sizes = [linear.numel for linear in tiny.streamed().linears[0]]
    shifts = [100, -100, 100, -100, 100, -100, 0]
    more_here = (tuple(size // 2 + shift for size, shift in zip(sizes, shifts, strict=True)),) * 4
    more_there = (tuple(size // 2 - shift for size, shift in zip(sizes, shifts, strict=True)),) * 4
    lanes, outcomes = advance(tiny, [more_here, more_there, more_here])
    assert [outcome[2].zeros for outcome in outcomes] == list(more_there)
    assert same(lanes[3], lanes[1])
    for number, plan in ((1, more_here), (2, more_there)):
        alone, outcomes_alone = advance(tiny, [plan])
        assert same(alone[1], lanes[number])
        assert [outcome[1] for outcome in outcomes_alone] == [outcome[number] for outcome in outcomes]


def test_the_number_of_zeros_is_exactly_that_of_the_plan(tiny_model, advance):
    tiny = tiny_model("opt")
    plans = plans_of_atp(tiny)
    _, outcomes = advance(tiny, plans)
    for number, plan in enumerate(plans, 1):
        assert [outcome[number].zeros for outcome in outcomes] == list(plan)
        total = sum(linear.numel for linears in tiny.streamed().linears for linear in linears)
        assert abs(sum(map(sum, plan)) / total - 0.6) <= 1e-4
    assert all(sum(outcome[0].zeros) == 0 for outcome in outcomes)


@pytest.mark.parametrize("pruner", [Wanda(), Magnitude()])
def test_zeros_of_the_checkpoint_that_a_lane_does_not_remove_are_counted(tiny_model, advance, pruner):
    tiny = tiny_model()
    linears = tiny.streamed().linears
    with_zeros = [name for name in tiny.checkpoint if name.endswith(("q_proj.weight", "down_proj.weight"))]
    for name in with_zeros:
        tiny.checkpoint[name][:, :2] = 0
    plans = [
        tuple(tuple(linear.out_features * each for linear in layer) for layer in linears) for each in (1, 3)
    ]
    _, outcomes = advance(tiny, plans, pruner)
    for layer, outcome in zip(linears, outcomes, strict=True):
        zeros = [
            2 * linear.out_features if linear.name.endswith(("q_proj", "down_proj")) else 0
            for linear in layer
        ]
        assert outcome[0].zeros == tuple(zeros)
        for lane, each in ((1, 1), (2, 3)):  # zeros are removed first
            removed = [linear.out_features * each for linear in layer]
            assert outcome[lane].zeros == tuple(map(max, zeros, removed))


def test_weights_are_ranked_in_the_dtype_of_the_checkpoint_and_not_of_the_computation(
    tiny_model, random_windows_of, layer_outputs, removed_of, advance
):
    """In bfloat16 many different weights are equal; an export prunes the values of the checkpoint."""
    tiny = tiny_model()
    removed = removed_of(tiny, SPARSITIES)
    lanes, _ = advance(tiny, [removed], Magnitude(), torch.bfloat16)

    def smallest(_index, _name, weight, count):
        mask = weight.abs() <= weight.abs().flatten().kthvalue(count).values
        half = weight.abs().bfloat16()
        assert int(mask.sum()) == count
        blurred.append(int((half <= half[mask].max()).sum()) > count)
        return mask

    blurred: list[bool] = []
    prune_reference(tiny, removed, smallest)
    assert any(blurred)  # there are ties at the threshold, but only in bfloat16
    pruned = tiny.cast(torch.bfloat16)
    expected = layer_outputs(pruned, tiny.layers_name, random_windows_of(5))[-1]
    torch.testing.assert_close(lanes[1].hidden_states, expected, rtol=0, atol=0.05)
    assert (lanes[1].hidden_states == expected).float().mean() > 0.9


def test_the_first_lane_must_be_the_dense_model(tiny_model, advance, removed_of):
    tiny = tiny_model()
    lane = Lane(removed_of(tiny, SPARSITIES), torch.zeros(1, 16, 32))
    with pytest.raises(ValueError, match="first lane is not the dense model"):
        LaneGroup(tiny.streamed(), [lane], Wanda(), None)


@pytest.mark.parametrize("first", [1, 3])
def test_resuming_in_the_middle_gives_the_bytes_of_an_uninterrupted_run(
    tiny_model, random_windows_of, statistics_of, advance, first
):
    tiny = tiny_model("gemma2-window")
    plans = plans_of_atp(tiny)
    undisturbed, outcomes = advance(tiny, plans)
    model, statistics = tiny.streamed(), statistics_of(tiny)
    hidden_states = torch.empty(5, 16, 32)
    embed_windows(model, random_windows_of(5), hidden_states, 0)
    lanes = [Lane(removed, hidden_states.clone()) for removed in (None, *plans)]
    interrupted = LaneGroup(model, lanes, Wanda(), statistics).advance(tiny.layers())
    before = [next(interrupted) for _ in range(first)]
    saved = [Lane(lane.removed, lane.hidden_states.clone()) for lane in lanes]
    resumed = LaneGroup(tiny.streamed(), saved, Wanda(), statistics)
    after = list(resumed.advance(tiny.layers(first), first))
    assert before + after == outcomes
    assert all(same(lane, other) for lane, other in zip(saved, undisturbed, strict=True))


def test_wanda_without_statistics_is_refused(tiny_model, random_windows_of):
    tiny, model = tiny_model(), tiny_model().streamed()
    hidden_states = torch.empty(1, 16, 32)
    embed_windows(model, random_windows_of(1), hidden_states, 0)
    lanes = [Lane(removed, hidden_states.clone()) for removed in (None, plans_of_atp(tiny)[0])]
    with pytest.raises(ValueError, match="received 0 calibration tokens"):
        # Sequential calibration on 0 windows.
        next(LaneGroup(model, lanes, Wanda(), None).advance(tiny.layers()))
