"""Tiny configurations of every type of language model that the installed transformers has.

The sizes of a type's default configuration are replaced by small ones, found by the names of its entries. Types whose
entries depend on each other in another way have a row in ``ENTRIES``.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VOCABULARY = 128
TEXT_TOKENS = 96  # tokens of texts are below; special tokens have the numbers from here on
LAYERS = 4
HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4, 2, 8

# New value of an entry, by the first pattern that its name matches. None: it keeps its value.
SIZES: tuple[tuple[str, int | None], ...] = (
    (r"num_labels|chunk_size_feed_forward|pretraining_tp|transformers_version", None),
    (r"key_value_heads|num_kv_heads|kv_heads|num_query_groups|n_groups|n_head_kv", KEY_VALUE_HEADS),
    (r"linear_num_key_heads", 2),
    (r"(^|_)heads$|n_heads?$|num_heads|mamba_num_heads|_heads(_|$)", HEADS),
    (r"qk_(nope|rope)_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"head_dim$|head_size$|dim_head|d_head|d_kv|qk_head_dim", HEAD_DIM),
    (r"mlp_ratio|expand|_freq|_period|_offset|_interval|_pattern|frequency", None),
    (r"vocab", VOCABULARY),
    (r"experts_per_tok|top_?k|num_selected|n_group|expert_group|moe_k|topk_group", 2),
    (r"n_shared|num_shared", 1),
    (r"experts", 4),
    (r"first_k_dense", 1),
    (r"max_position|n_positions|n_ctx|seq_len|context_length|max_seq", 64),
    (r"^layers$|hidden_layers$|num_layers$|n_layers?$|depth$|encoder_layers$|decoder_layers$", LAYERS),
    (r"intermediate|ffn|d_ff|dff|dim_ff|n_inner|feed_forward_size", 48),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
    (r"lora_rank|low_?rank", 16),
    (r"state|d_conv|conv_kernel", 4),
    (r"window|chunk", 8),
)  # fmt: skip
DERIVED = ("per_layer_config", "hybrid_layer_ids")  # computed again from the other entries
SMALL = 32  # of the other sizes above 64

# Entries that are None by default and that some models need.
WITHOUT_DEFAULT = {"head_dim": HEAD_DIM, "num_key_value_heads": KEY_VALUE_HEADS, "num_experts_per_tok": 2}

# Entries without which there is no default configuration.
NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}
# Entries that the patterns do not find, by model type; a dot leads into a configuration within the configuration.
HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
SHARED_KEYS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_BY_KIND = {"full_attention": ROPE, "sliding_attention": ROPE}
QWEN4_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
ENTRIES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "cohere_compass": {"text_config.rope_parameters": ROPE_BY_KIND},
    "cohere_compass_text": {"rope_parameters": ROPE_BY_KIND},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 16,
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": SHARED_KEYS,
        "intermediate_size": [48] * LAYERS,
    },
    "gemma4": {"text_config.num_kv_shared_layers": 2, "text_config.layer_types": SHARED_KEYS},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": SHARED_KEYS},
    "gemma4_assistant": {"text_config.layer_types": SHARED_KEYS, "text_config.num_kv_shared_layers": LAYERS},
    "gemma4_unified_assistant": {
        "text_config.layer_types": SHARED_KEYS,
        "text_config.num_kv_shared_layers": 2,
    },
    "glm5_next": {"text_config.index_kpool": 2},
    "granite4_vision": {
        "deepstack_layer_map": [[1, 0], [3, 1]],
        "vision_config.hidden_size": 64,
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"mamba_d_head": 16, "num_local_experts": 0},
    "inkling2": {"text_config.n_layers_per_attn_res_block": 2},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "kimi_linear": {"topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 1]},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1, 2, 3]},
    "nemo_speechlm": {
        "audio_config.diarization_config.chunk_right_context": 4,
        "word_timestamp_config.num_key_value_heads": HEADS,
    },
    "paddleocr_vl": {"text_config.rope_parameters.mrope_section": [2, 1, 1]},
    "qwen4_exp": {f"text_config.{name}": value for name, value in QWEN4_INDEXER.items()},
    "qwen4_exp_text": QWEN4_INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "step3p7": {"text_config.sliding_window": 8},
    "vibevoice_asr": {
        "acoustic_tokenizer_chunk_size": 6400,
        "acoustic_tokenizer_encoder_config.num_filters": 2,
        "acoustic_tokenizer_encoder_config.depths": [1] * 7,
        "semantic_tokenizer_encoder_config.num_filters": 2,
        "semantic_tokenizer_encoder_config.depths": [1] * 7,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": LAYERS, "max_inference_chunksize": 64},
    "zamba": {
        "attention_hidden_size": 64,
        "num_hidden_layers": 6,
        "layers_block_type": HYBRID,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "num_hidden_layers": 6,
        "layers_block_type": HYBRID,
        "attention_head_dim": 16,
        "mamba_headdim": 16,
        "num_key_value_heads": 4,
        "mamba_ngroups": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """Return every type for which transformers has a causal or a multimodal language model."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return a configuration of ``model_type`` with small sizes and a vocabulary of ``VOCABULARY`` tokens."""
    kind = CONFIG_MAPPING[model_type]
    own = ENTRIES.get(model_type, {})
    default = kind(**NEEDED.get(model_type, {}))
    special = iter(range(TEXT_TOKENS, VOCABULARY))
    small = shrunk(default.to_dict(), special)
    for path, value in own.items():
        *parents, leaf = path.split(".")
        place = small
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    small.pop("transformers_version", None)
    return kind.from_dict(small)


def shrunk(entries: Mapping[str, Any], special: Iterator[int]) -> dict[str, Any]:
    """Return the entries of a configuration with small sizes, also in the configurations within it."""
    layers = next(
        (entries[name] for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if isinstance(entries.get(name), int)), 0
    )  # fmt: skip
    small: dict[str, Any] = {}
    for name, value in entries.items():
        if name in ("rope_parameters", "rope_scaling"):
            small[name] = value and small_rope(value, entries)
        elif name in DERIVED:
            continue
        elif isinstance(value, dict):
            is_config = "model_type" in value or name.endswith("_config")
            small[name] = shrunk(value, special) if is_config else value
        elif re.search(r"token_(id|index)$", name):
            small[name] = special_tokens(name, value, special)
        elif isinstance(value, list | tuple) and layers > LAYERS and len(value) == layers:
            small[name] = one_of_each(value)
        elif isinstance(value, list | tuple) and re.search(r"(indexes|idxs|_layers|layer_ids)$", name):
            small[name] = [1, 3][: len(value)] if all(isinstance(each, int) for each in value) else value
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = small_size(name, value)
        elif value is None and name in WITHOUT_DEFAULT:
            small[name] = WITHOUT_DEFAULT[name]
        else:
            small[name] = value
    if "kv_lora_rank" in entries:  # latent attention has no groups of heads
        small["num_key_value_heads"] = small.get("num_attention_heads", HEADS)
    if entries.get("head_dim") == entries.get("qk_rope_head_dim") is not None:
        small["head_dim"] = small["qk_rope_head_dim"]
    kind = CONFIG_MAPPING[entries["model_type"]] if entries.get("model_type") in CONFIG_MAPPING else None
    if "mrope_section" in getattr(kind, "ignore_keys_at_rope_validation", ()) and small.get(
        "rope_parameters"
    ):
        small["rope_parameters"].setdefault("mrope_section", small_sections(3, small["rope_parameters"]))
    return small


def small_size(name: str, value: int) -> int:
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return value if size is None or value <= 0 else size
    return SMALL if value > 64 else value


def special_tokens(name: str, value: Any, special: Iterator[int]) -> Any:
    if value is None or (isinstance(value, int) and value < 0):
        return value
    if isinstance(value, list | tuple):
        return [next(special)]
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return fixed[name] if name in fixed else next(special)


def one_of_each(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Return ``LAYERS`` of the values in their order, with every kind if there are not more kinds than that."""
    last = len(values) - 1  # some models need a layer of a certain kind at the end
    chosen = sorted({values.index(value) for value in values} - {last})[: LAYERS - 1] + [last]
    chosen += [index for index in range(len(values)) if index not in chosen][: LAYERS - len(chosen)]
    return [values[index] for index in sorted(chosen)]


def small_sections(parts: int, rope: Mapping[str, Any]) -> list[int]:
    """Divide the pairs of a rotary embedding among time, height and width."""
    pairs = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    return [pairs // parts + (index < pairs % parts) for index in range(parts)]


def small_rope(rope: dict[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of rotary positions whose sections fit ``HEAD_DIM``."""
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            small[name] = small_rope(value, entries)
        elif name == "mrope_section":
            small[name] = small_sections(len(value), rope)
        elif name in ("short_factor", "long_factor"):
            small[name] = [1.0] * (HEAD_DIM // 2)
        elif name == "original_max_position_embeddings":
            small[name] = 64
        else:
            small[name] = value
    return small
