"""Split model: both parts together are the model, with gradients, for families that call their layers differently."""

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from layerwise.models.split_model import SplitModel

SHAPE = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=32)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, intermediate_size=24, num_key_value_heads=1, head_dim=8)
    ),
    "gemma4": lambda: Gemma4ForCausalLM(  # with embeddings for every layer, and shared keys and values
        Gemma4TextConfig(
            **SHAPE | {"num_hidden_layers": 4},
            intermediate_size=24,
            num_key_value_heads=1,
            head_dim=8,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=31,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SHAPE)),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_parts_give_the_logits_and_gradients_of_the_model(family, recompute):
    model = MODELS[family]().eval()
    input_ids = torch.randint(31, (1, 9))
    expected = model(input_ids=input_ids, use_cache=False).logits
    gradients = torch.autograd.grad(expected.square().sum(), [*model.parameters()])
    split = SplitModel(model, recompute)
    logits = split.logits(split.hidden_states(input_ids))
    assert torch.equal(logits, expected)
    found = torch.autograd.grad(logits.square().sum(), [*model.parameters()])
    assert all(map(torch.equal, found, gradients))
    assert torch.equal(model(input_ids=input_ids, use_cache=False).logits, expected)  # it is whole again


@pytest.mark.parametrize("family", MODELS)
def test_the_head_can_be_applied_to_some_of_the_positions(family):
    split = SplitModel(MODELS[family]().eval())
    states = split.hidden_states(torch.randint(31, (1, 9)))
    some = split.logits(states[:, 3:7])
    assert torch.allclose(some, split.logits(states)[:, 3:7], atol=1e-6)
