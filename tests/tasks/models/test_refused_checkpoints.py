"""Folders without a model that can be pruned are refused at once, by name."""

import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
)

from layerwise.storage.files.errors import Corrupt
from layerwise.tasks.import_checkpoint import import_checkpoint


def test_a_truncated_file_is_refused(local_store, save_model):
    folder = save_model()
    os.truncate(folder / "model.safetensors", 60_000)
    with pytest.raises(Corrupt, match="60000 bytes"):
        import_checkpoint(local_store, str(folder))


def test_pickle_files_are_refused_with_a_command_that_converts_them(local_store, llama, save_model):
    folder = save_model()
    (folder / "model.safetensors").unlink()
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"(?s)pytorch_model\.bin.*not read.*save_pretrained"):
        import_checkpoint(local_store, str(folder))


def test_a_pickle_next_to_safetensors_is_ignored(local_store, llama, save_model):
    folder = save_model()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    assert import_checkpoint(local_store, str(folder)).num_layers == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks 1 of the 21 tensors.*1\.mlp\.up_proj"),
        (lambda t: t.pop("lm_head.weight"), r"lacks 1 .*lm_head\.weight.*tie_word_embeddings"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight .*shape \(31,\).*asks for \(32,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            r"model\.norm\.weight .*stored as I8.*not a quantized one",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.float64)}),
            r"model\.norm\.weight .*stored as F64.*Convert them: .*dtype='float32'",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.ones(97, 4, dtype=torch.uint8)}),
            r"stored as U8.*not a quantized one",
        ),
        (
            lambda t: t.update({"module.model.norm.weight": torch.ones(32)}),
            r"two tensors for model\.norm\.weight: .*module\.model\.norm\.weight",
        ),
        (lambda t: t.update({"norm.weight": torch.ones(32)}), r"two tensors for model\.norm\.weight"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}),
            r"holds model\.layers\.2\..*says the model has 2 layers",
        ),
    ],
    ids=[
        "missing",
        "no head",
        "shape",
        "dtype",
        "float64",
        "packed",
        "wrapped twice",
        "twice",
        "too many layers",
    ],
)
def test_tensors_that_do_not_match_the_config_are_refused_by_name(
    local_store, save_model, edit_tensors, change, message
):
    folder = save_model()
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(local_store, str(folder))


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(
    local_store, llama, save_model, edit_config
):
    folder = save_model(llama())
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        import_checkpoint(local_store, str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "my_own", "auto_map": {"AutoConfig": "code.py"}}, r"'my_own'.*own code.*never run"),
        ({"model_type": None}, "does not know"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized with gptq"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
            "quantized with compressed-tensors, but only .* fp8 with block scales",
        ),
        ({"hidden_size": 64}, r"has the shape .*config\.json asks for"),
        (T5Config().to_dict(), "encoder-decoder"),
    ],
    ids=[
        "own code",
        "no type",
        "quantized",
        "other fp8",
        "other shape",
        "encoder-decoder",
    ],
)
def test_configurations_that_cannot_be_pruned_are_refused_by_name(
    local_store, save_model, edit_config, changes, message
):
    folder = save_model()
    edit_config(folder, **json.loads(json.dumps(changes, default=str)))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(local_store, str(folder))


def test_a_real_encoder_decoder_is_refused(local_store, save_model):
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, vocab_size=97)
    folder = save_model(T5ForConditionalGeneration(config))
    with pytest.raises(ValueError, match="t5 is an encoder-decoder"):
        import_checkpoint(local_store, str(folder))


def test_a_folder_without_config_is_refused(local_store, save_model):
    folder = save_model()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        import_checkpoint(local_store, str(folder))


def test_a_missing_shard_is_named_with_its_tensors(local_store, save_model):
    folder = save_model(max_shard_size="30KB")
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the 4 shards.*00002-of-00004.*model\.layers"):
        import_checkpoint(local_store, str(folder))


def test_an_index_of_another_save_is_refused(local_store, save_model):
    folder = save_model(max_shard_size="30KB")
    shard = folder / "model-00002-of-00004.safetensors"
    save_file(dict(list(load_file(shard).items())[1:]), shard)
    with pytest.raises(ValueError, match="The index and the shards are from different saves"):
        import_checkpoint(local_store, str(folder))


def test_shards_without_an_index_are_refused(local_store, save_model):
    folder = save_model(max_shard_size="30KB")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="the files of the model are not known"):
        import_checkpoint(local_store, str(folder))


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    local_store, llama, save_model, edit_tensors, kind, dtype
):
    folder = save_model(llama().to(dtype))
    edit_tensors(folder, lambda t: t["model.layers.1.mlp.down_proj.weight"].view(-1)[5:6].fill_(float(kind)))
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight in model\.safetensors .* holds"
    ):
        import_checkpoint(local_store, str(folder))


def test_a_weight_that_is_not_finite_is_refused_on_the_hub(local_store, hub):
    shard = hub.folder / "model-00002-of-00004.safetensors"
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} .* holds NaN"):
        import_checkpoint(local_store, "tiny/llama")


@pytest.mark.parametrize(
    "settings", ['{"peft_type": "IA3", "base_model_name_or_path": "owner/base"}', "damaged", None]
)
@pytest.mark.parametrize("whole", [True, False], ids=["next to weights", "alone"])
def test_an_adapter_is_refused_even_if_added_after_the_import(local_store, save_model, settings, whole):
    folder = save_model()
    import_checkpoint(local_store, str(folder))
    save_file({"base_model.model.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    if settings is not None:
        (folder / "adapter_config.json").write_text(settings)
    if not whole:
        (folder / "model.safetensors").unlink()
        (folder / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"an adapter.*adapter_model\.safetensors.*merge_and_unload"
    ) as refused:
        import_checkpoint(local_store, str(folder))
    if settings and settings.startswith("{"):
        assert "(IA3)" in str(refused.value)
        assert "'owner/base'" in str(refused.value)


BILLION = 10**9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": BILLION}, r"asks for 1000000000 layers .* hold tensors of 2"),
        ({"num_hidden_layers": "6"}, r"has '6' for num_hidden_layers"),
        ({"num_hidden_layers": [2]}, r"has a list for num_hidden_layers"),
        ({"num_hidden_layers": True}, r"has True for num_hidden_layers"),
        ({"hidden_size": -1}, r"has -1 for hidden_size"),
        ({"hidden_size": BILLION}, r"has the shape .*config\.json asks for"),
        ({"num_attention_heads": 0}, r"has 0 for num_attention_heads"),
        ({"head_dim": -5}, r"has -5 for head_dim"),
        ({"head_dim": BILLION}, r"has the shape .*config\.json asks for"),
        ({"vocab_size": 2.5}, r"has 2\.5 for vocab_size"),
        ({"pad_token_id": BILLION}, r"1000000000 for pad_token_id"),
        ({"num_labels": BILLION}, r"1000000000 for num_labels"),
        ({"hidden_act": "os.system"}, r"cannot be used with 'os\.system' for hidden_act"),
        ({"text_config": 5}, r"cannot be used with 5 for text_config"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters"),
        ({"layer_types": 7}, r"cannot be used with 7 for layer_types"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_invalid_values_of_a_config_are_named_in_one_line(
    local_store, save_model, edit_config, changes, message
):
    folder = save_model()
    edit_config(folder, **changes)
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as refused:
        import_checkpoint(local_store, str(folder))
    assert "\n" not in str(refused.value)
    # 20 s allows for a busy machine; building a billion layers would take days.
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("depth", [60, 100_000])
def test_a_config_that_is_nested_too_deeply_is_refused(local_store, save_model, depth):
    folder = save_model()
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(f'{text}, "deep": {"[" * depth}{"]" * depth}}}')
    with pytest.raises(ValueError, match=r"config\.json of .* is not valid JSON"):
        import_checkpoint(local_store, str(folder))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ("5", "no valid weight_map"),
        ("[]", "no valid weight_map"),
        ("[" * 100_000 + "]" * 100_000, "no valid weight_map"),
        ('{"lm_head.weight": "../secret.safetensors"}', r"lacks 1 of the 1 shards .*\.\./secret"),
        ('{"lm_head.weight": "/etc/passwd"}', "lacks 1 of the 1 shards .*/etc/passwd"),
        ('{"lm_head.weight": 5}', "lacks 1 of the 1 shards"),
    ],
    ids=["number", "list", "deep", "parent", "absolute", "no name"],
)
def test_an_invalid_index_is_refused(local_store, save_model, weight_map, message):
    folder = save_model(max_shard_size="30KB")
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(ValueError, match=message):
        import_checkpoint(local_store, str(folder))
