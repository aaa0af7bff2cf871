"""Whole searches over a mixture of experts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from layerwise.flows.pipeline.inputs import inspect_inputs
from layerwise.flows.plan import plan_search
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.scoring.perplexity import perplexity
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.allocate import read_plans
from layerwise.tasks.results.search_result import RESULT_FILE
from layerwise.tasks.texts.token_windows import read_input_ids

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8, "vocab_size": 97}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture(scope="module")
def model(workshop, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_moe") / "model"
    shutil.copytree(workshop.model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPE, **HEADS, **EXPERTS, initializer_range=0.2)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"recover": "refit", "allocator": "owl", "betas": None, "granularity": "expert"},
        {"pruner": "sparsegpt", "pattern": "N:8"},
    ],
    ids=["wanda, refit, a sparsity per expert", "sparsegpt, N:8"],
)
def test_a_mixture_of_experts_is_planned_searched_and_exported(workshop, prefect_backend, model, changes):
    url = str(model.parent / "store")  # the searches use one import and one capture
    small = {"model": str(model), "betas": [0.1], "calibration_windows": 24, "seqlen": 24}
    settings, runtime = workshop.settings(**small | changes), SearchRuntime(store=url)
    assert plan_search(settings, runtime).stages
    result = search(settings, runtime)
    assert search(settings, runtime).built == ()
    store = ArtifactStore(url)
    windows = read_input_ids(store, result.stages["test"])
    loaded = AutoModelForCausalLM.from_pretrained(result.pruned).eval()
    with torch.no_grad():
        losses = [loaded(input_ids=ids[None], labels=ids[None]).loss.item() for ids in windows]
    assert perplexity(losses) == pytest.approx(result.test.best, rel=1e-5)
    report = json.loads((Path(result.pruned) / "sparsity.json").read_text())
    assert report["realised"] == pytest.approx(0.5, abs=1e-4)
    if "granularity" in changes:
        plan = read_plans(store, result.stages["allocate"])[1]
        attention, experts = 4, 3 * EXPERTS["num_experts"]
        for layer in plan.layers:
            assert len(layer) == attention + experts
            assert len(set(layer[:attention])) == 1
            of_experts = [layer[first : first + 3] for first in range(attention, len(layer), 3)]
            assert all(len(set(shares)) == 1 for shares in of_experts)
            assert len(set(of_experts)) > 1
    experts = json.loads(store.read(result.artifact, RESULT_FILE))["experts"]
    assert [sum(row["tokens"]) for row in experts["layers"]] == [24 * 24 * 2] * 3
    assert experts["text"] in Path(result.report).read_text()
    assert experts["text"] in (Path(result.pruned) / "README.md").read_text()


def test_experts_that_do_not_tell_their_tokens_are_not_calibrated_on_responses(workshop, tmp_path):
    shutil.copytree(
        workshop.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    experts = {"kv_channels": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 16}
    shape = {name: value for name, value in (SHAPE | HEADS | experts).items() if name != "head_dim"}
    JetMoeForCausalLM(JetMoeConfig(**shape)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    )
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(24)))
    texts = {"model": str(tmp_path / "model"), "calibration": str(tmp_path / "chat.jsonl")}
    settings = workshop.settings(**texts, calibrate_on="responses")
    with pytest.raises(
        ValueError, match="responses, and jetmoe computes its experts in a forward pass of its own"
    ):
        inspect_inputs(ArtifactStore(str(tmp_path / "store")), settings)
    # Without the experts, nothing depends on their tokens. JetMoE has experts in attention and in the MLP.
    others = settings.model_copy(update={"exclude": "experts"})
    assert inspect_inputs(ArtifactStore(str(tmp_path / "store")), others).linears
