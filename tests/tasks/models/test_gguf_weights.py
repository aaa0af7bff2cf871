"""GGUF weights: agreement with transformers on the same files, and refusal of damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import AutoConfig

from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import import_checkpoint, inspect_source

LAYER_SHAPES = {
    "attn_norm": (32,),
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_norm": (32,),
    "ffn_gate": (64, 32),
    "ffn_up": (64, 32),
    "ffn_down": (32, 64),
}


def write_gguf(
    path: Path, architecture: str = "llama", experts: int = 0, left_out: str = "none", q8: bool = False
) -> Path:
    """Write a random model of two layers, in float32 or in 8-bit blocks."""
    writer = GGUFWriter(path, architecture)
    for number in (
        (writer.add_block_count, 2),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, 6),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
    ):
        number[0](number[1])
    if experts:
        writer.add_expert_count(experts)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([2, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    shapes = {"token_embd": (6, 32), "output_norm": (32,), "output": (6, 32)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER_SHAPES.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name == left_out:
            continue
        weight = random.standard_normal(shape, dtype=np.float32)
        if q8 and len(shape) == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("q8", [False, True])
def test_a_gguf_file_is_read_as_transformers_does(store, tmp_path, equals_transformers, q8):
    path = write_gguf(tmp_path / "tiny.gguf", q8=q8)
    checkpoint = import_checkpoint(store, str(path))
    equals_transformers(checkpoint, path)
    assert checkpoint.tokenizer()("abba")["input_ids"] == [5, 4, 3]


def test_a_gguf_file_on_remote_storage_gives_the_same_model(local_store, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf")
    store = ArtifactStore(f"memory://{tmp_path.name}")
    store.fs.pipe_file(f"{store.root}/models/tiny.gguf", path.read_bytes())
    remote = import_checkpoint(local_store, f"memory://{tmp_path.name}/models/tiny.gguf")
    assert remote.identity == import_checkpoint(local_store, str(path)).identity


def test_the_config_of_a_gguf_model_loads_with_transformers(local_store, tmp_path):
    checkpoint = import_checkpoint(local_store, str(write_gguf(tmp_path / "tiny.gguf")))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_bytes(local_store.read(checkpoint.artifact, "config.json"))
    config = AutoConfig.from_pretrained(tmp_path / "export")
    assert (config.architectures, config.dtype) == (["LlamaForCausalLM"], torch.bfloat16)
    assert (config.hidden_size, config.num_key_value_heads, config.vocab_size) == (32, 2, 6)
    assert config.to_dict() == {**checkpoint.config.to_dict(), "_name_or_path": config.name_or_path}


def test_inspecting_a_gguf_file_gives_the_shapes_of_an_import(local_store, tmp_path):
    path = str(write_gguf(tmp_path / "tiny.gguf"))
    inspected, imported = inspect_source(path), import_checkpoint(local_store, path).index
    assert inspected.layer_bytes == imported.layer_bytes
    assert inspected.outer_bytes == imported.outer_bytes
    assert inspected.config == imported.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "rwkv6"}, r"GGUF architecture 'rwkv6', which transformers cannot read"),
        ({"architecture": "qwen2moe", "experts": 4}, "mixture of experts"),
        ({"experts": 4}, "mixture of experts"),
        ({"left_out": "blk.1.ffn_up"}, r"lacks 1 of the 21 tensors.*layers\.1\.mlp\.up_proj"),
    ],
)
def test_gguf_files_that_cannot_be_pruned_are_refused_by_name(local_store, tmp_path, settings, message):
    path = write_gguf(tmp_path / "tiny.gguf", **settings)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(local_store, str(path))


NUMBER, BLOCKS, ARRAYS = b"general.architecture", b"llama.block_count", b"tokenizer.ggml.tokens"


@pytest.mark.parametrize(
    ("after", "skipped", "value", "message"),
    [
        (b"GGUF", 4, 2**60, r"takes .* bytes at byte .* but the file ends"),  # number of tensors
        (b"GGUF", 12, 2**60, r"cannot be read as GGUF"),  # number of fields
        (NUMBER, 4, 2**60, r"a string takes 1152921504606846976 bytes"),
        (ARRAYS, 8, 2**60, r"cannot be read as GGUF"),  # entries of an array of strings
        (b"tokenizer.ggml.token_type", 8, 2**60, r"an array takes 4611686018427387904 bytes"),
        (BLOCKS, 4, 10**9, r"asks for 1000000000 layers .* hold tensors of 2"),
        (BLOCKS, 4, 0, r"has 0 for num_hidden_layers"),
        (b"llama.attention.head_count", 4, 0, r"has 0 for num_attention_heads"),
        (b"blk.1.ffn_up.weight", 0, 2**31, r"a tensor has 2147483648 dimensions"),
        (b"blk.1.ffn_up.weight", 4, 2**62, r"cannot be read as GGUF"),
    ],
)
def test_impossible_numbers_in_a_gguf_header_are_refused_at_once(
    local_store, tmp_path, after, skipped, value, message
):
    path = write_gguf(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    at = content.index(after) + len(after) + skipped
    size = 4 if after in (BLOCKS, b"llama.attention.head_count") or value == 2**31 else 8
    content[at : at + size] = value.to_bytes(size, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        import_checkpoint(local_store, str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        (b"general.architecture", b"general.architecturx"),
        (b"llama.embedding_length", b"llama.embedding_lengtx"),
        (b"tokenizer.ggml.model", b"tokenizer.ggml.modex"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenx"),
    ],
)
def test_a_gguf_file_without_a_required_field_is_refused_in_one_line(local_store, tmp_path, name, other):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(name, other))
    with pytest.raises(ValueError, match=r"tiny\.gguf") as refused:
        import_checkpoint(local_store, str(path))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_a_whole_gguf_file_is_refused(local_store, tmp_path):
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    for name, damaged in {"other": b"safetensors", "short": content[:-5000], "header": content[:100]}.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}\.gguf cannot be read as GGUF"):
            import_checkpoint(local_store, str(path))
