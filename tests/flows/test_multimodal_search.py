"""Whole searches over the language model of a multimodal model."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    PreTrainedModel,
)

from layerwise.flows.cli.tables import show_result
from layerwise.flows.compress import Compress, compress
from layerwise.flows.plan import plan_search
from layerwise.flows.runtime import Runtime, SearchRuntime
from layerwise.flows.search import search
from layerwise.scoring.perplexity import perplexity
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.texts.token_windows import read_input_ids

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8, "vocab_size": 97}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


# Embeddings of the tokens for every layer, and a layer that uses the keys and values of another one.
FOR_EVERY_LAYER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "num_kv_shared_layers": 1,
}
KINDS = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "global_head_dim": 16}


def gemma3() -> PreTrainedModel:
    config = Gemma3Config(
        text_config=TEXT | HEADS | {"initializer_range": 0.2},
        vision_config=IMAGES | {"image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config)


def gemma4() -> PreTrainedModel:
    config = Gemma4Config(
        text_config=TEXT | HEADS | FOR_EVERY_LAYER | KINDS | {"initializer_range": 0.2},
        vision_config=IMAGES | {"head_dim": 16, "patch_size": 8},
    )
    return Gemma4ForConditionalGeneration(config)


MODELS = {"gemma3": gemma3, "gemma4": gemma4}


@pytest.fixture(scope="module")
def model(request, workshop, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    shutil.copytree(workshop.model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    MODELS[request.param]().save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


@pytest.mark.parametrize(
    ("model", "changes"),
    [("gemma3", {"recover": "refit"}), ("gemma3", {"pruner": "sparsegpt"}), ("gemma4", {"recover": "refit"})],
    ids=["gemma3, wanda, refit", "gemma3, sparsegpt", "gemma4, wanda, refit"],
    indirect=["model"],
)
def test_a_multimodal_model_is_searched_exported_and_tested(
    workshop, prefect_backend, model, tmp_path_factory, capsys, changes
):
    store = str(model.parent / "store")  # both searches of a model use one import and one capture
    settings = workshop.settings(model=str(model), betas=[0.1], calibration_windows=24, seqlen=24, **changes)
    runtime = SearchRuntime(store=store)
    (export,) = (stage for stage in plan_search(settings, runtime).stages if stage.name == "export")
    assert export.reads == export.writes == sum(weight.nbytes for weight in weights_of(model).values())
    result = search(settings, runtime)
    assert search(settings, runtime).built == ()
    windows = read_input_ids(ArtifactStore(store), result.stages["test"])
    for folder, measured in ((model, result.test.dense), (Path(result.pruned), result.test.best)):
        loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
        with torch.no_grad():
            losses = [loaded(input_ids=ids[None], labels=ids[None]).loss.item() for ids in windows]
        assert perplexity(losses) == pytest.approx(measured, rel=1e-5)
    dense, pruned = weights_of(model), weights_of(Path(result.pruned))
    assert set(pruned) == set(dense)
    linears = {name for name in dense if re.search(r"language_model.*\.layers\..*(_proj|_gate)", name)}
    assert len(linears) == {"gemma3": 21, "gemma4": 25}[model.name]
    assert {name for name in dense if not torch.equal(dense[name], pruned[name])} == linears
    zeros = sum(int((pruned[name] == 0).sum()) for name in linears)
    assert zeros == round(0.5 * sum(dense[name].numel() for name in linears))
    show_result(Console(), result)
    assert "AutoModelForMultimodalLM.from_pretrained" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"{model.name} is multimodal"):
        compress(Compress(search=result.artifact.key), Runtime(store=store))
