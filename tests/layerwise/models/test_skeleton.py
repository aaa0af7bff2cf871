"""Properties of a model that are known without its weights."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BertConfig,
    Blip2Config,
    CLIPConfig,
    FalconConfig,
    Gemma3Config,
    GPTJConfig,
    JetMoeConfig,
    LlamaConfig,
    MptConfig,
    Qwen2_5_VLConfig,
    Qwen3MoeConfig,
    T5Config,
    ViTConfig,
    XLMConfig,
)
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from layerwise.models.experts import experts_of_unknown_tokens
from layerwise.models.skeleton import (
    Linear,
    UnsupportedModel,
    build_outline,
    build_skeleton,
    expected_tensors,
    layer_prefix,
    linears_of,
    require_positions,
)

FAMILIES = ["llama", "llama-tied", "gemma2-window", "phi3", "opt-projected", "gpt-neox", "gpt2", "bloom"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_has_computed_buffers_but_no_weights(tiny_model, family):
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
def test_the_decoder_layers_of_every_family_are_found(tiny_model, family):
    tiny = tiny_model(family)
    assert layer_prefix(build_skeleton(tiny.reference.config)) == tiny.layers_name


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_the_tensors_of_a_checkpoint(tiny_model, family):
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


def test_linears_in_lists_within_a_layer_are_found_with_their_full_names():
    layer = nn.ModuleDict(
        {"experts": nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3)]), "norm": nn.LayerNorm(2)}
    )
    assert [linear.name for linear in linears_of(layer)] == ["experts.0", "experts.1"]


@pytest.mark.parametrize("config_class", [T5Config, BartConfig])
def test_an_encoder_decoder_is_refused_by_name(config_class):
    with pytest.raises(UnsupportedModel, match=f"{config_class.model_type} is an encoder-decoder"):
        build_skeleton(config_class())


class EinsumExperts(JetMoeParallelExperts):
    """Experts whose weights are not multiplied one by one."""

    def forward(self, inputs, expert_size):
        return torch.einsum("ti,eoi->to", inputs, self.weight)


def test_experts_that_are_computed_in_a_way_of_their_own_are_refused_by_name(monkeypatch):
    monkeypatch.setattr("transformers.models.jetmoe.modeling_jetmoe.JetMoeParallelExperts", EinsumExperts)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    config = JetMoeConfig(**shape, kv_channels=8, num_local_experts=3, num_experts_per_tok=2)
    with pytest.raises(
        UnsupportedModel,
        match=r"jetmoe is a mixture of experts \(num_local_experts = 3\) .*self_attention\.experts\.input_linear",
    ):
        build_skeleton(config)


def test_experts_in_a_forward_pass_of_their_own_do_not_tell_their_tokens():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    jetmoe = JetMoeConfig(
        **shape, intermediate_size=48, kv_channels=8, num_local_experts=3, num_experts_per_tok=2
    )
    qwen3_moe = Qwen3MoeConfig(**shape, **heads, num_experts=4, moe_intermediate_size=16)
    for build in (build_outline, build_skeleton):
        assert experts_of_unknown_tokens(build(jetmoe)).startswith("model.layers.0.")
        assert experts_of_unknown_tokens(build(qwen3_moe)) is None


class MisreadExperts(Qwen3MoeExperts):
    """Experts that declare the layout of Qwen3-MoE, and use another one."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states

    forward.__wrapped__ = forward


def test_experts_that_do_not_compute_what_their_layout_says_are_refused_by_name(monkeypatch):
    monkeypatch.setattr("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts", MisreadExperts)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(UnsupportedModel, match=r"qwen3_moe is a mixture of experts .*0\.mlp\.experts"):
        build_skeleton(Qwen3MoeConfig(**shape, **heads))


def test_a_model_without_one_list_of_decoder_layers_is_refused_by_name():
    small = XLMConfig(emb_dim=32, n_layers=2, n_heads=4, vocab_size=61)
    with pytest.raises(UnsupportedModel, match="xlm has .* module lists of 2 decoder layers"):
        build_skeleton(small)


def test_a_model_that_is_not_a_language_model_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match="no causal language model for 'vit'"):
        build_skeleton(ViTConfig())


@pytest.mark.parametrize("family", ["gpt2", "opt-projected"])
def test_windows_longer_than_the_learned_positions_are_refused(tiny_model, family):
    skeleton = build_skeleton(tiny_model(family).reference.config)
    positions = skeleton.config.max_position_embeddings
    require_positions(skeleton, positions)
    with pytest.raises(
        ValueError, match=f"a window has {positions + 1} tokens, but .* learned {positions} positions"
    ):
        require_positions(skeleton, positions + 1)


@pytest.mark.parametrize(
    "config",
    [
        GPTJConfig(n_embd=32, n_layer=2, n_head=4, n_positions=16, rotary_dim=4, vocab_size=61),
        MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=16, vocab_size=61),
    ],
    ids=["gptj", "mpt"],
)
def test_windows_longer_than_a_computed_table_of_positions_are_refused(config):
    require_positions(build_outline(config), 16)
    with pytest.raises(ValueError, match="a window has 17 tokens, but .* 16 positions"):
        require_positions(build_outline(config), 17)


def rope(**settings) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, **settings}}


@pytest.mark.parametrize(
    ("seqlen", "settings", "warned"),
    [
        (256, {}, False),
        (257, {}, True),
        (1024, rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=256), False),
        (1025, rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=256), True),
        (1026, rope(rope_type="linear", factor=4.0), True),
        (1024, rope(rope_type="linear", factor=4.0), False),
        (
            258,
            rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
            True,
        ),
    ],
    ids=["within", "beyond", "yarn within", "yarn beyond", "linear beyond", "linear within", "llama3 beyond"],
)
def test_windows_beyond_rotary_positions_cause_one_warning(caplog, seqlen, settings, warned):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = LlamaConfig(**small, max_position_embeddings=256, **settings)
    for _ in range(2):
        require_positions(build_outline(config), seqlen)
    messages = [
        record.getMessage() for record in caplog.records if record.name == "layerwise.models.skeleton"
    ]
    assert len(messages) == warned
    assert all(
        f"a window has {seqlen} tokens" in message and "was made for" in message for message in messages
    )


def test_alibi_has_no_limit(caplog):
    config = FalconConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, alibi=True, max_position_embeddings=16
    )
    require_positions(build_outline(config), 400)
    assert not caplog.records


@pytest.mark.parametrize("config_class", [Gemma3Config, Qwen2_5_VLConfig])
def test_only_the_language_model_of_a_multimodal_model_is_expected(config_class):
    outline = build_outline(config_class())
    assert layer_prefix(outline) == "model.language_model.layers"
    outside = {name for name in expected_tensors(outline) if ".layers." not in name} - {"lm_head.weight"}
    assert outside == {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}


def test_the_positions_of_an_image_encoder_are_not_those_of_text(caplog):
    text = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 4}
    images = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # four patches
    require_positions(build_outline(Gemma3Config(text_config=text, vision_config=images)), 16)
    assert "was made for 4 positions" in caplog.text


def test_a_multimodal_model_that_returns_no_text_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"'clip' that takes text and returns text \(vision_config\)"):
        build_skeleton(CLIPConfig())


def test_a_multimodal_model_that_needs_an_image_is_refused_by_name():
    with pytest.raises(UnsupportedModel, match=r"blip-2 needs more than tokens \(pixel_values\)"):
        build_outline(Blip2Config())


def test_an_encoder_is_refused_unless_it_is_configured_as_a_decoder():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    with pytest.raises(UnsupportedModel, match="bert is an encoder"):
        build_skeleton(BertConfig(**small))
    assert layer_prefix(build_skeleton(BertConfig(**small, is_decoder=True))) == "bert.encoder.layer"


def test_an_outline_has_the_shapes_of_the_model_and_takes_no_memory(tiny_model):
    config = tiny_model("gemma2-window").reference.config
    outline = build_outline(config)
    assert expected_tensors(outline) == expected_tensors(build_skeleton(config))
    assert all(tensor.is_meta for tensor in [*outline.parameters(), *outline.buffers()])
