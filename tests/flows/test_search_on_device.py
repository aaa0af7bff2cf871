"""Whole searches on a device: everything is where it is computed, weights cross once, nothing waits per batch.

The device is simulated. The tests marked ``gpu`` need CUDA.
"""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerwise.flows.plan import plan_search
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.lanes import LaneGroup
from layerwise.models import hidden_states
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import import_checkpoint
from tests.simulated_device import simulated_device

DEVICES = ["sim:0", pytest.param("cuda", marks=pytest.mark.gpu)]
METHODS = {
    "magnitude, 2:4": {"pruner": "magnitude", "pattern": "2:4", "betas": None},
    "sparsegpt, lsa": {"pruner": "sparsegpt", "allocator": "lsa"},
    "alps, owl": {"pruner": "alps", "allocator": "owl", "betas": None},
    "wanda_swaps, alpha_pruning": {"pruner": "wanda_swaps", "allocator": "alpha_pruning", "betas": None},
    "sequential, dlp": {"calibration_mode": "sequential", "allocator": "dlp", "betas": None},
    "train, dsa": {"recover": {"method": "train", "epochs": 1}, "allocator": "dsa", "betas": None},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_a_device_with_the_results_of_the_cpu(
    workshop, prefect_backend, tmp_path, method, device
):
    settings = workshop.settings(**METHODS[method])
    on_cpu = search(settings, SearchRuntime(store=str(tmp_path / "cpu"), device="cpu"))
    with simulated_device() if device.startswith("sim") else nullcontext():
        runtime = SearchRuntime(store=str(tmp_path / "device"), device=device, device_memory_gib=1)
        found = search(settings, runtime)
    assert [row.loss for row in found.selection.rows] == pytest.approx(
        [row.loss for row in on_cpu.selection.rows], abs=1e-3
    )
    assert found.selection.best == on_cpu.selection.best


def test_weights_cross_once_in_each_pass_and_hidden_states_only_if_they_do_not_fit(
    workshop, prefect_backend, tmp_path, caplog
):
    """Also if the memory is exhausted during the search."""

    def run(name: str, gib: int, memory: int = 1 << 40) -> None:
        runtime = SearchRuntime(store=str(tmp_path / name), device="sim:0", device_memory_gib=gib)
        traffic.restart()
        traffic.total = memory
        search(workshop.settings(), runtime)

    with simulated_device() as traffic:
        run("fits", 1)
        to_device, to_host, peak = traffic.to_device, traffic.to_host, traffic.peak
        index = import_checkpoint(ArtifactStore(str(tmp_path / "fits")), str(workshop.model)).index
        layers, outer = sum(index.layer_bytes), index.outer_bytes
        # Three passes: capture, lanes, and export together with the test. Small: tokens, norms of inputs, losses, statistics.
        small = 0.2 * layers
        assert 0 <= to_device - 3 * (layers + outer) < small
        assert 0 <= to_host - layers < small  # the export

        run("crosses", 0)
        # Lanes of the search and of the test, without the dense model; each has at least about four windows.
        lanes, windows = 3 + 2, 4
        states = 4 * 16 * 32 * windows * lanes * index.num_layers
        assert traffic.to_device - 3 * (layers + outer) > states
        assert traffic.to_host - layers > states
        least = traffic.peak
        assert least < peak
        assert "too little memory" not in caplog.text

        run("exhausts", 1, (least + peak) // 2)
        assert "sim:0 has too little memory" in caplog.text
    assert files_of(tmp_path / "fits") == files_of(tmp_path / "crosses") == files_of(tmp_path / "exhausts")


def files_of(store: Path) -> set[tuple[str, str]]:
    """Return the key of every artifact, and the digest of each of its tensors and tables; without reports, which have times."""
    opened = ArtifactStore(str(store))
    return {
        (key, file.digest)
        for key in (str(path.parent.relative_to(store)) for path in store.glob("*/*/manifest.json"))
        for name, file in opened.get(key).files.items()
        if name.endswith((".safetensors", ".parquet")) and not key.startswith("report/")
    }


def test_a_search_needs_the_memory_of_its_plan_and_is_refused_where_there_is_less(
    workshop, prefect_backend, tmp_path
):
    model = tmp_path / "wide"
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "vocab_size": 97}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).to(torch.bfloat16).save_pretrained(model)
    for file in workshop.model.glob("token*"):
        (model / file.name).write_bytes(file.read_bytes())
    settings = workshop.settings(model=str(model), pruner="alps", recover="refit", betas=[0.1])
    runtime = SearchRuntime(store=str(tmp_path / "store"), device="sim:0", device_memory_gib=0)
    with simulated_device() as traffic:
        planned = sum(plan_search(settings, runtime).device_memory.values())
        traffic.total = planned - 1
        with pytest.raises(ValueError, match="which has .* A layer cannot be split") as refusal:
            search(settings, runtime)
        assert "layer in use" in str(refusal.value)
        assert not (tmp_path / "store" / "import_checkpoint").exists()
        traffic.total = planned
        search(settings, runtime)
    assert 0.7 * planned < traffic.peak <= planned


@pytest.mark.gpu
@pytest.mark.parametrize("method", [{}, {"pruner": "sparsegpt"}, {"recover": "refit"}])
def test_artifacts_are_equal_on_equal_devices(workshop, prefect_backend, tmp_path, method):
    stores = [tmp_path / "one", tmp_path / "other"]
    for store, gib in zip(stores, [0, 1], strict=True):
        runtime = SearchRuntime(store=str(store), device="cuda", device_memory_gib=gib)
        search(workshop.settings(**method), runtime)
    assert files_of(stores[0]) == files_of(stores[1])


@pytest.mark.parametrize("recover", [None, {"method": "refit", "steps": 2}], ids=["one-shot", "refit"])
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
    for windows in (2, 6):
        changes = {"calibration_windows": windows + 2, "selection_windows": windows, "test_windows": windows}
        runtime = SearchRuntime(store=str(tmp_path / f"{windows}"), device="sim:0", device_memory_gib=1)
        waits.clear()
        with simulated_device() as traffic:
            search(workshop.settings(recover=recover, **changes), runtime)
        found.append(list(waits))
    if recover is None:  # the steps of a refit wait, and their number depends on the values
        assert found[0] == found[1]
    assert max(map(max, found)) <= 20  # with the export
