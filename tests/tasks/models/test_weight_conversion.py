"""Conversion of stored tensors into weights and back, as transformers loads and saves them."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from layerwise.tasks.models.weight_conversion import StoredNames, weights_on_meta

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 31}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
HYBRID = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, **HEADS, num_local_experts=3)),
    # More than ten experts: 10 must not come before 2.
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, **HEADS, num_experts=12, moe_intermediate_size=8)
    ),
    "olmo_hybrid": lambda: OlmoHybridForCausalLM(
        OlmoHybridConfig(**SHAPE, **HEADS, **HYBRID, pad_token_id=0)
    ),
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Return a random model, and its tensors as transformers saves them."""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    model.save_pretrained(tmp_path)
    return model, load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("prefix", ["", "model."], ids=["as saved", "as saved from the base model"])
def test_stored_tensors_become_the_weights_of_the_model_and_back(saved, prefix):
    model, stored = saved
    stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    names, state = StoredNames(stored, model), model.state_dict()
    assert names.conversions
    converted = set()
    for conversion in names.conversions:
        sources = {source.name: stored[source.name] for source in conversion.sources}
        weights = conversion.weights(sources)
        assert weights
        assert all(torch.equal(weight, state[name]) for name, weight in weights.items())
        again = conversion.stored(weights)
        assert set(again) == set(sources)
        assert all(torch.equal(tensor, sources[name]) for name, tensor in again.items())
        on_meta = weights_on_meta(conversion, {name: tensor.to("meta") for name, tensor in sources.items()})
        assert {name: each.shape for name, each in on_meta.items()} == {
            n: w.shape for n, w in weights.items()
        }
        converted |= set(weights)
    others = {names.aliases(name)[0] for name in stored} - {each.target for each in names.conversions}
    assert others | converted == set(state)
