"""Whole searches on a simulated device: everything is where it is computed, weights cross once, nothing waits per batch."""

import pytest

from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.lanes import LaneGroup
from layerwise.models import hidden_states
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import import_checkpoint
from tests.simulated_device import simulated_device

METHODS = {
    "magnitude, 2:4": {"pruner": "magnitude", "pattern": "2:4", "betas": None},
    "sparsegpt, lsa": {"pruner": "sparsegpt", "allocator": "lsa"},
    "alps, owl": {"pruner": "alps", "allocator": "owl", "betas": None},
    "wanda_swaps, alpha_pruning": {"pruner": "wanda_swaps", "allocator": "alpha_pruning", "betas": None},
    "sequential, dlp": {"calibration_mode": "sequential", "allocator": "dlp", "betas": None},
    "race, dsa": {"strategy": "race", "allocator": "dsa", "betas": None},
    "train": {"recover": {"method": "train", "epochs": 1}},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_a_device_with_the_results_of_the_cpu(
    workshop, prefect_backend, tmp_path, method
):
    settings = workshop.settings(**METHODS[method])
    on_cpu = search(settings, SearchRuntime(store=str(tmp_path / "cpu")))
    device = {"device": "sim:0", "device_memory_gib": 1}
    with simulated_device() as traffic:
        found = search(settings, SearchRuntime(store=str(tmp_path / "device"), **device))
    assert traffic.to_device
    assert [row.loss for row in found.selection.rows] == pytest.approx(
        [row.loss for row in on_cpu.selection.rows], abs=1e-3
    )
    assert found.selection.best == on_cpu.selection.best


@pytest.mark.parametrize("gib", [0, 1])
def test_weights_cross_once_in_each_pass_and_hidden_states_only_if_they_do_not_fit(
    workshop, prefect_backend, tmp_path, gib
):
    store = str(tmp_path / "store")
    with simulated_device() as traffic:
        search(workshop.settings(), SearchRuntime(store=store, device="sim:0", device_memory_gib=gib))
    index = import_checkpoint(ArtifactStore(store), str(workshop.model)).index
    layers, outer = sum(index.layer_bytes), index.outer_bytes
    # Three passes: capture, lanes, and export together with the test. Small: tokens, norms of inputs, losses, statistics.
    small = 0.2 * layers
    lanes, windows = (
        3 + 2,
        4,
    )  # of the search and of the test, which also has the dense model; about so many windows
    states = 4 * 16 * 32 * windows * lanes * index.num_layers
    if gib:
        assert 0 <= traffic.to_device - 3 * (layers + outer) < small
        assert 0 <= traffic.to_host - layers < small  # the export
    else:
        assert traffic.to_device - 3 * (layers + outer) > states
        assert traffic.to_host - layers > states


@pytest.mark.parametrize("recover", [None, "refit"])
def test_the_number_of_waits_in_a_layer_does_not_depend_on_the_windows(
    workshop, prefect_backend, tmp_path, monkeypatch, recover
):
    monkeypatch.setattr(hidden_states, "TOKENS_PER_FORWARD", 32)  # two windows
    advance = LaneGroup.advance
    waits: list[int] = []

    def counted(group, *arguments):
        before = traffic.waits
        for outcome in advance(group, *arguments):
            waits.append(traffic.waits - before)
            yield outcome
            before = traffic.waits

    monkeypatch.setattr(LaneGroup, "advance", counted)
    found = []
    for windows in (4, 12):
        changes = {"calibration_windows": windows + 2, "selection_windows": windows, "test_windows": windows}
        runtime = SearchRuntime(store=str(tmp_path / f"{windows}"), device="sim:0", device_memory_gib=1)
        waits.clear()
        with simulated_device() as traffic:
            search(workshop.settings(recover=recover, **changes), runtime)
        found.append(list(waits))
    if recover is None:
        assert found[0] == found[1]
    # With the export; the steps of a refit wait, and their number depends on the values.
    assert max(map(max, found)) <= (20 if recover is None else 40)
