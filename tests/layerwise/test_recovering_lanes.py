"""Recovery within the lanes: each lane recovers its own layers, on its own calibration windows."""

from weakref import ref

import pytest
import torch

from layerwise import lanes
from layerwise.calibration.capture import capture_layers, embed_windows
from layerwise.lanes import Lane, LaneGroup
from layerwise.pruners.wanda import Wanda
from layerwise.recovery.pruned_layer import weights_replaced
from layerwise.recovery.refit import Refit
from layerwise.recovery.train import Train

pytestmark = pytest.mark.usefixtures("two_windows_at_a_time")

CALIBRATION = 6  # windows, followed by 3 scored windows
SPARSITIES = [(0.25, 0.5, 0.625, 0.75), (0.5,) * 4, (0.75, 0.5, 0.5, 0.25)]
FAMILIES = ["llama", "gpt2", "gemma2-window", "falcon"]
RECOVERIES = [Refit(), Train(learning_rate=0.01, epochs=1)]


def removed_of(tiny, sparsities) -> tuple[tuple[int, ...], ...]:
    layers = zip(sparsities, tiny.streamed().linears, strict=True)
    return tuple(tuple(round(sparsity * linear.numel) for linear in linears) for sparsity, linears in layers)


@pytest.fixture
def group_of(random_windows_of):
    """Build a lane group that is calibrated on the dense model; ``found`` gives earlier recoveries by lane."""

    def build(tiny, plans, recovery, dtype=torch.float32, found=None, calibration_windows=CALIBRATION):
        model, calibration = tiny.streamed(dtype), random_windows_of(calibration_windows, seed=7)
        hidden_states = torch.empty(calibration_windows, 16, 32, dtype=dtype)
        embed_windows(model, calibration, hidden_states, calibration_windows)
        captured = capture_layers(model, tiny.layers(), hidden_states, calibration_windows)
        statistics = [each.statistics for each in captured]
        windows = torch.cat([calibration, random_windows_of(3)])
        embedded = torch.empty(len(windows), 16, 32, dtype=dtype)
        embed_windows(model, windows, embedded, calibration_windows)
        lanes = [Lane(removed, embedded.clone(), recovered=[]) for removed in (None, *plans)]
        for lane, weights in zip(lanes[1:], found or [], strict=False):
            lane.recovered_weights = weights.__getitem__
        rooms = torch.empty(2, calibration_windows, 16, 32, dtype=dtype).unbind()
        return LaneGroup(
            model,
            lanes,
            Wanda(),
            statistics.__getitem__,
            calibration_windows,
            recovery=recovery,
            rooms=rooms,
        )

    return build


def same(lane, other) -> bool:
    return torch.equal(lane.hidden_states, other.hidden_states)


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lane_group_gives_the_same_bytes_as_each_lane_alone(tiny_model, group_of, family, recovery):
    tiny = tiny_model(family)
    plans = [removed_of(tiny, sparsities) for sparsities in SPARSITIES]
    group = group_of(tiny, plans, recovery)
    outcomes = list(group.advance(tiny.layers()))
    for number, plan in enumerate(plans, 1):
        alone = group_of(tiny, [plan], recovery)
        outcomes_alone = list(alone.advance(tiny.layers()))
        assert same(alone.lanes[0], group.lanes[0])
        assert same(alone.lanes[1], group.lanes[number])
        assert [outcome[1] for outcome in outcomes_alone] == [outcome[number] for outcome in outcomes]
        assert [outcome[number].zeros for outcome in outcomes] == list(plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_were_recovered_earlier_give_the_same_hidden_states(tiny_model, group_of, family, dtype):
    tiny = tiny_model(family)
    plans = [removed_of(tiny, sparsities) for sparsities in SPARSITIES[:2]]
    first = group_of(tiny, plans, Train(learning_rate=0.01, epochs=1), dtype)
    outcomes = list(first.advance(tiny.layers()))
    again = group_of(tiny, plans, None, dtype, [lane.recovered for lane in first.lanes[1:]])
    outcomes_again = list(again.advance(tiny.layers()))
    for lane, other in zip(first.lanes, again.lanes, strict=True):
        assert same(lane, other)
    for layers, others in zip(outcomes, outcomes_again, strict=True):
        assert [(each.error, each.zeros) for each in layers] == [(each.error, each.zeros) for each in others]
        assert all(each.recovery is None for each in others)
    assert any(each.recovery.accepted for layers in outcomes for each in layers[1:])


def test_recovery_lowers_the_error_and_leaves_the_dense_lane_alone(tiny_model, group_of):
    tiny = tiny_model()
    plans = [removed_of(tiny, SPARSITIES[1])]
    pruned, recovered = (
        group_of(tiny, plans, recovery, calibration_windows=64) for recovery in (None, Refit(alpha=0))
    )
    before, after = (list(group.advance(tiny.layers()))[0] for group in (pruned, recovered))
    assert same(pruned.lanes[0], recovered.lanes[0])
    assert after[1].error < 0.95 * before[1].error
    assert after[0].recovery is None


def test_a_layer_whose_held_out_error_rises_keeps_its_pruned_weights(tiny_model, group_of):
    """The dense hidden states are replaced by noise, so that a fit to the dense model's outputs fits noise."""
    tiny = tiny_model()
    plans = [removed_of(tiny, SPARSITIES[1])]
    groups = [group_of(tiny, plans, recovery) for recovery in (None, Refit(alpha=1, damping=0, steps=100))]
    for group in groups:
        noise = torch.randn(CALIBRATION, 16, 32, generator=torch.Generator().manual_seed(4))
        group.lanes[0].hidden_states[:CALIBRATION] = noise
    steps = [next(group.advance(tiny.layers())) for group in groups]
    outcome = steps[1][1].recovery
    assert outcome.after > outcome.before
    assert groups[1].lanes[1].recovered == [{}]
    assert same(groups[0].lanes[1], groups[1].lanes[1])


def test_a_layer_that_loses_nothing_is_not_recovered(tiny_model, group_of):
    tiny = tiny_model()
    group = group_of(tiny, [removed_of(tiny, (0.0, 0.5, 0.0, 0.5))], Refit())
    outcomes = list(group.advance(tiny.layers()))
    assert [outcome[1].recovery is None for outcome in outcomes] == [True, False, True, False]
    assert [bool(weights) for weights in group.lanes[1].recovered] == [False, True, False, True]


def test_the_recovered_weights_are_those_that_the_lane_advances_through(tiny_model, group_of):
    tiny = tiny_model("gpt2")
    group = group_of(tiny, [removed_of(tiny, SPARSITIES[1])], Refit())
    states = group.lanes[1].hidden_states.clone()
    next(group.advance(tiny.layers()))
    model = tiny.streamed()
    with (
        model.loaded(0, tiny.layers()[0]) as layer,
        weights_replaced(layer, group.lanes[1].recovered[0]),
    ):
        expected = model.run_layer(0, layer, states)
    torch.testing.assert_close(group.lanes[1].hidden_states, expected)


def test_recovered_weights_that_nobody_wants_are_freed_before_the_next_lane_is_recovered(
    tiny_model, group_of, monkeypatch
):
    """Otherwise the memory would grow by a layer for every lane."""
    tiny, accepted = tiny_model(), []

    def recover_layer(pruned, settings):
        assert not any(weight() is not None for weight in accepted)
        found = lanes_recover_layer(pruned, settings)
        accepted.extend(map(ref, found.weights.values()))
        return found

    lanes_recover_layer = lanes.recover_layer
    monkeypatch.setattr(lanes, "recover_layer", recover_layer)
    plans = [removed_of(tiny, sparsities) for sparsities in SPARSITIES]
    group = group_of(tiny, plans, Refit(alpha=0), calibration_windows=64)
    for lane in group.lanes:
        lane.recovered = None
    list(group.advance(tiny.layers()))
    assert len(accepted) > len(tiny.layers()) * len(
        tiny.streamed().linears[0]
    )  # more than one lane in each layer
