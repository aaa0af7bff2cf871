"""Estimate of times: what scales with windows and lanes, what overlaps, and the lanes that a strategy is expected to run."""

from dataclasses import replace

import pytest

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.compute_rates import ComputeRates
from layerwise.flows.pipeline.lookup import look_up
from layerwise.flows.pipeline.search_strategy import SearchStrategy
from layerwise.flows.pipeline.size_estimate import SearchSizes
from layerwise.flows.pipeline.time_estimate import REFITTED_LANES, SearchTimes, expected_requests
from layerwise.models.skeleton import Linear
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.allocate import AllocateSettings
from layerwise.tasks.models.transfer_rates import TransferRates

LAYERS = 3  # of the tiny model
LINEARS = [[Linear("mlp", 10, 10, False)]] * 2
# Only the forward pass takes time: a second for every window.
FORWARD = ComputeRates(layer=1, statistics=0, grams=0, load=0, preparing=0, pruning=0, head=0)
AT_ONCE = TransferRates(read=None, imported=None, written=None, notes=())


@pytest.fixture
def times(workshop, tmp_path):
    """Return times of a search with six calibration, four selection and three test windows."""

    def estimate(compute=FORWARD, transfer=AT_ONCE, **changes) -> SearchTimes:
        settings = workshop.settings(**changes)
        inputs = look_up(ArtifactStore(str(tmp_path / "store")), settings).inputs
        windows = {"calibration": 6, "selection": 4, "test": 3}
        return SearchTimes(
            SearchSizes(settings, inputs.index, inputs.linears, "float32", 3, windows), compute, transfer
        )

    return estimate


def test_a_stage_takes_the_time_of_its_windows_in_all_layers(times):
    assert times().capture == LAYERS * (6 + 4)
    # Dense, uniform and best; the three windows of the last two also pass the pruned layers with the dense input.
    assert times().evaluation == LAYERS * (3 + 2 * (3 + 3))
    assert times().lanes(count=5, windows=8, groups=1, together=1) == LAYERS * 5 * 8


def test_lanes_that_calibrate_themselves_also_run_their_calibration_windows_twice(times):
    sequential = times(calibration_mode="sequential")
    assert sequential.lanes(count=5, windows=4, groups=1, together=1) == LAYERS * 5 * (4 + 2 * 6)


def test_a_recovered_lane_takes_as_long_as_was_measured_where_both_texts_are_as_long(times):
    plain, recovered = times(), times(recover="refit")
    together = {"groups": 1, "together": 1}
    assert recovered.lanes(1, 6, **together) == pytest.approx(REFITTED_LANES * plain.lanes(1, 6, **together))
    assert times(recover="train").recovery(plans=2) > recovered.recovery(plans=2) == 2 * recovered.recovery(1)


def test_the_next_layer_is_read_while_a_layer_is_computed(times):
    fast, slow = (replace(AT_ONCE, read=rate) for rate in (1e12, 1.0))
    assert times(transfer=fast).capture == pytest.approx(times().capture)
    index = times().sizes.index
    # The first layer is read before, and all others while layers are computed, which takes less time.
    read = sum(index.layer_bytes) + index.outer_bytes + index.layer_bytes[0]
    assert times(transfer=slow).capture == pytest.approx(read, rel=0.01)


def test_groups_that_run_at_the_same_time_take_the_time_of_one(times):
    def seconds(groups, together):
        return times().lanes(count=6, windows=4, groups=groups, together=together)

    assert seconds(groups=3, together=3) == seconds(groups=1, together=1) / 3
    assert seconds(groups=3, together=1) == seconds(groups=1, together=1)


def strategy(name: str, trials: int, windows: int = 32) -> SearchStrategy:
    plans = tuple(SparsityPlan(beta / 100, (0.5, 0.5)) for beta in range(11))
    return SearchStrategy(name, plans, trials, windows, AllocateSettings(0.5, betas=()), LINEARS)


def lane_windows(search: SearchStrategy) -> int:
    """Return the number of windows of all lanes together."""
    ranges = [
        (len(request.plans), request.windows or (0, search.windows))
        for request in expected_requests(search, {})
    ]
    return sum(lanes * (end - first) for lanes, (first, end) in ranges)


def test_a_search_is_expected_to_run_as_many_lanes_as_its_strategy_needs_for_a_typical_curve():
    grid = lane_windows(strategy("grid", 11))
    assert grid == 11 * 32
    assert lane_windows(strategy("auto", 6)) < lane_windows(strategy("adaptive", 6)) < grid
    assert 2 * 32 < lane_windows(strategy("race", 11)) < grid


def test_a_strategy_that_makes_its_own_plans_is_expected_to_make_all_that_it_may():
    search = strategy("evolutionary", 64)
    assert sum(len(request.plans) for request in expected_requests(search, {})) == 64


@pytest.mark.parametrize("name", ["auto", "adaptive", "race"])
def test_what_is_left_of_a_search_is_what_it_would_do_after_the_lanes_so_far(name):
    search = strategy(name, 6)
    requests, scored = expected_requests(search, {}), {}
    for number, request in enumerate(requests):
        assert expected_requests(search, scored) == requests[number:]
        scored |= dict.fromkeys(request.plans, (request.windows or (0, 32))[1])
    assert expected_requests(search, scored) == []
