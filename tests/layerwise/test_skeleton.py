"""What is known of a model before any of its weights is read."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    T5Config,
    ViTConfig,
    XLMConfig,
)

from layerwise.skeleton import (
    Linear,
    UnsupportedModel,
    build_skeleton,
    expected_tensors,
    layer_prefix,
    linears_of,
    require_positions,
)

FAMILIES = ["llama", "llama-tied", "gemma2-window", "phi3", "opt-projected", "gpt-neox", "gpt2", "bloom"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_has_no_weights_but_true_buffers(tiny_model, family):
    tiny = tiny_model(family)
    skeleton = build_skeleton(tiny.reference.config)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    buffers = dict(skeleton.named_buffers())
    expected = dict(tiny.reference.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[name], expected[name]) for name in buffers)


def test_a_skeleton_takes_no_memory_for_a_model_of_70_billion_weights():
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80
    )
    skeleton = build_skeleton(config)
    assert sum(parameter.numel() for parameter in skeleton.parameters()) > 60e9
    assert all(parameter.is_meta for parameter in skeleton.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_are_found_where_the_family_keeps_them(tiny_model, family):
    tiny = tiny_model(family)
    assert layer_prefix(build_skeleton(tiny.reference.config)) == tiny.layers_name


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_those_of_a_checkpoint(tiny_model, family):
    tiny = tiny_model(family)
    expected = expected_tensors(build_skeleton(tiny.reference.config))
    assert expected == {name: tuple(weight.shape) for name, weight in tiny.checkpoint.items()}


def test_trained_buffers_are_expected_of_a_checkpoint(tiny_model):
    tiny = tiny_model("gemma4")
    expected = expected_tensors(build_skeleton(tiny.reference.config))
    assert expected == {name: tuple(tensor.shape) for name, tensor in tiny.checkpoint.items()}


def test_linears_of_a_llama_layer_are_seven_and_keys_and_values_are_narrow(tiny_model):
    layer = build_skeleton(tiny_model().reference.config).model.layers[0]
    assert linears_of(layer) == (
        Linear("self_attn.q_proj", 32, 32, transposed=False),
        Linear("self_attn.k_proj", 16, 32, transposed=False),
        Linear("self_attn.v_proj", 16, 32, transposed=False),
        Linear("self_attn.o_proj", 32, 32, transposed=False),
        Linear("mlp.gate_proj", 48, 32, transposed=False),
        Linear("mlp.up_proj", 48, 32, transposed=False),
        Linear("mlp.down_proj", 32, 48, transposed=False),
    )


def test_linears_of_a_gpt2_layer_are_stored_transposed(tiny_model):
    layer = build_skeleton(tiny_model("gpt2").reference.config).transformer.h[0]
    assert linears_of(layer) == (
        Linear("attn.c_attn", 96, 32, transposed=True),
        Linear("attn.c_proj", 32, 32, transposed=True),
        Linear("mlp.c_fc", 128, 32, transposed=True),
        Linear("mlp.c_proj", 32, 128, transposed=True),
    )
    for linear in linears_of(layer):
        stored = layer.get_submodule(linear.name).weight
        assert linear.oriented(stored).shape == (linear.out_features, linear.in_features)
        assert linear.oriented(linear.oriented(stored)).shape == stored.shape


def test_a_linear_knows_its_size_and_the_name_of_its_weight():
    linear = Linear("mlp.up_proj", out_features=48, in_features=32, transposed=False)
    assert (linear.numel, linear.weight_name) == (1536, "mlp.up_proj.weight")


def test_linears_in_lists_within_a_layer_are_found_under_their_full_names():
    layer = nn.ModuleDict(
        {"experts": nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3)]), "norm": nn.LayerNorm(2)}
    )
    assert [linear.name for linear in linears_of(layer)] == ["experts.0", "experts.1"]


@pytest.mark.parametrize("config_class", [T5Config, BartConfig])
def test_an_encoder_decoder_is_refused_by_name(config_class):
    with pytest.raises(UnsupportedModel, match=f"{config_class.model_type} is an encoder-decoder"):
        build_skeleton(config_class())


@pytest.mark.parametrize("config_class", [MixtralConfig, Qwen3MoeConfig])
def test_a_mixture_of_experts_is_refused_by_name(config_class):
    with pytest.raises(UnsupportedModel, match=f"{config_class.model_type} is a mixture of experts .* = "):
        build_skeleton(config_class())


def test_a_model_without_one_list_of_decoder_layers_is_refused_by_name():
    small = XLMConfig(emb_dim=32, n_layers=2, n_heads=4, vocab_size=61)
    with pytest.raises(UnsupportedModel, match="xlm has .* module lists of 2 decoder layers"):
        build_skeleton(small)


def test_a_model_that_is_no_language_model_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match="no causal language model for 'vit'"):
        build_skeleton(ViTConfig())


@pytest.mark.parametrize("family", ["gpt2", "opt-projected"])
def test_windows_longer_than_the_learned_positions_are_refused(tiny_model, family):
    skeleton = build_skeleton(tiny_model(family).reference.config)
    positions = skeleton.config.max_position_embeddings
    require_positions(skeleton, positions)
    with pytest.raises(
        ValueError, match=f"learned {positions} positions, and a window has {positions + 1} tokens"
    ):
        require_positions(skeleton, positions + 1)


def test_rotary_positions_have_no_end(tiny_model):
    skeleton = build_skeleton(tiny_model("llama").reference.config)
    beyond = skeleton.config.max_position_embeddings + 1
    assert require_positions(skeleton, beyond) is None
