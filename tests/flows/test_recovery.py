"""Searches with recovery: the chosen model's weights, its layers in the store, and what is reported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from layerwise.flows.cli.show import show_key
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.scoring.perplexity import perplexity
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.roles import LAYERS_RECOVERED, RECOVERED_BEST, RECOVERED_UNIFORM
from layerwise.tasks.texts.token_windows import read_input_ids

WINDOWS = {"calibration_windows": 40, "selection_windows": 4, "test_windows": 4, "seqlen": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recovered")


@pytest.fixture(scope="module")
def search_of(workshop, prefect_backend, folder):
    """Run a search with some settings in the common store."""

    def run(**changes):
        return search(workshop.settings(betas=[0.1], **WINDOWS, **changes), SearchRuntime(store=str(folder)))

    return run


@pytest.fixture(scope="module")
def recovered(search_of):
    return search_of(recover="refit", recover_windows=16)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_recovery_leaves_everything_but_the_pruned_linears_as_it_is(recovered, workshop):
    dense, after = weights_of(workshop.model), weights_of(Path(recovered.pruned))
    described = json.loads((Path(recovered.pruned) / "sparsity.json").read_text())
    of_linears = {f"model.layers.{row['layer']}.{row['linear']}.weight": row for row in described["linears"]}
    for name, weight in after.items():
        if name in of_linears:
            assert int((weight == 0).sum()) == of_linears[name]["zeros"]
        else:
            assert torch.equal(weight, dense[name])
    assert described["realised"] == pytest.approx(0.5, abs=1e-4)
    assert described["recovery"]["method"] == "refit"
    kept = [name for name in of_linears if torch.equal(after[name], dense[name].where(after[name] != 0, 0))]
    recovered_layers = recovered.stages[RECOVERED_BEST].facts[LAYERS_RECOVERED]
    assert recovered_layers > 0
    assert len(kept) == 7 * (3 - recovered_layers)


def test_the_exported_model_has_the_perplexity_of_the_test(recovered, folder):
    store = ArtifactStore(str(folder))
    model = AutoModelForCausalLM.from_pretrained(recovered.pruned)
    windows = read_input_ids(store, recovered.stages["test"])
    with torch.no_grad():
        losses = [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in windows]
    assert perplexity(losses) == pytest.approx(recovered.test.best, rel=1e-4)
    assert recovered.recovery.best.test == recovered.test.best
    assert recovered.recovery.held_out_windows == 5


def test_a_second_run_computes_nothing(search_of, recovered):
    assert search_of(recover="refit", recover_windows=16).built == ()


def test_every_layer_of_both_plans_is_an_artifact(recovered, folder):
    layers = [artifact for artifact in ArtifactStore(str(folder)).artifacts("recovered_layer/")]
    plans = {RECOVERED_BEST, RECOVERED_UNIFORM} & recovered.stages.keys()
    assert len(layers) == 3 * len(plans)


def test_the_result_shows_both_texts_and_what_was_done(recovered, folder, capsys):
    show_key(str(folder), recovered.artifact.key)
    shown = capsys.readouterr().out
    assert "best, pruned" in shown
    assert "held-out calibration text" in shown
    assert "fitted on 35 windows (840 tokens)" in shown
    assert "compared after a refit on 16 of the 40 windows" in shown
    assert "from the same source as the calibration text" in shown
