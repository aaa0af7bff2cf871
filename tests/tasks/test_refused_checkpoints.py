"""Folders that hold no model that can be pruned are refused at once, by name."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MixtralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from storage.corrupt import Corrupt
from tasks.import_checkpoint import import_checkpoint


def test_a_truncated_file_is_refused(local_store, save_model):
    folder = save_model()
    os.truncate(folder / "model.safetensors", 60_000)
    with pytest.raises(Corrupt, match="60000 bytes"):
        import_checkpoint(local_store, str(folder))


def test_pickle_files_are_refused_with_the_way_to_convert_them(local_store, llama, save_model):
    folder = save_model()
    (folder / "model.safetensors").unlink()
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"(?s)pytorch_model\.bin.*not read.*save_pretrained"):
        import_checkpoint(local_store, str(folder))


def test_a_pickle_beside_safetensors_is_not_looked_at(local_store, llama, save_model):
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
            r"model\.norm\.weight .*stored as I8",
        ),
        (lambda t: t.update({"norm.weight": torch.ones(32)}), r"two tensors for model\.norm\.weight"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}),
            r"holds model\.layers\.2\..*says the model has 2 layers",
        ),
    ],
    ids=["missing", "no head", "shape", "dtype", "twice", "too many layers"],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(
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
        ({"hidden_size": 64}, r"has the shape .*config\.json asks for"),
        ({**MixtralConfig(num_local_experts=4).to_dict(), "num_hidden_layers": 2}, "mixture of experts"),
        (T5Config().to_dict(), "encoder-decoder"),
    ],
    ids=["own code", "no type", "quantized", "other shape", "experts", "encoder-decoder"],
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
    with pytest.raises(ValueError, match="Index and shards are from different saves"):
        import_checkpoint(local_store, str(folder))


def test_shards_without_an_index_are_refused(local_store, save_model):
    folder = save_model(max_shard_size="30KB")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="not known which belong together"):
        import_checkpoint(local_store, str(folder))
