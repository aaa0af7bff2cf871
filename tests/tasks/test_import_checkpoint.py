"""Import of checkpoints from folders: weights, names, identity, and resumption."""

import logging
import re
import shutil
import uuid
from typing import ClassVar

import pytest
import torch
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
)

from layerwise.storage.content_sample import WHOLE
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.tasks.import_checkpoint import import_checkpoint, inspect_source


def all_weights(checkpoint) -> dict[str, torch.Tensor]:
    weights = dict(checkpoint.read(checkpoint.outer_tensors()))
    for number, layer in enumerate(checkpoint.layers()):
        weights |= {f"{checkpoint.layer_prefix}.{number}.{name}": t.clone() for name, t in layer.items()}
    return weights


def assert_same(weights, expected) -> None:
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "30KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_weight_is_read_as_it_was_saved(local_store, llama, save_model, dtype, shards):
    model = llama().to(dtype)
    folder = save_model(model, **shards)
    assert (folder / "model.safetensors.index.json").exists() == bool(shards)
    checkpoint = import_checkpoint(local_store, str(folder))
    assert_same(all_weights(checkpoint), model.state_dict())
    assert checkpoint.config.to_dict() == model.config.from_pretrained(folder).to_dict()
    assert (checkpoint.num_layers, checkpoint.layer_prefix) == (2, "model.layers")


def test_a_checkpoint_is_opened_from_every_kind_of_store(store, llama, save_model):
    model = llama()
    folder = str(save_model(model))
    import_checkpoint(store, folder)
    assert_same(all_weights(import_checkpoint(store, folder)), model.state_dict())


@pytest.mark.parametrize("backend", ["memory", "s3"])
def test_a_checkpoint_on_remote_storage_is_read_in_place(request, local_store, llama, save_model, backend):
    bucket = request.getfixturevalue("s3_bucket") if backend == "s3" else "models"
    url = f"{backend}://{bucket}/{uuid.uuid4().hex}"
    model = llama()
    fs, path = open_filesystem(url)
    fs.put(str(save_model(model, max_shard_size="30KB")), path, recursive=True)
    checkpoint = import_checkpoint(local_store, url)
    assert_same(all_weights(checkpoint), model.state_dict())
    assert not [name for name in checkpoint.artifact.files if name.endswith(".safetensors")]
    assert import_checkpoint(local_store, url).artifact == checkpoint.artifact


def test_tied_embeddings_are_stored_once(local_store, llama, save_model):
    model = llama(tie_word_embeddings=True)
    checkpoint = import_checkpoint(local_store, str(save_model(model)))
    assert list(checkpoint.read(checkpoint.outer_tensors())) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    assert checkpoint.artifact.facts["parameters"] == model.num_parameters()


def test_a_tied_embedding_may_be_stored_as_the_head(local_store, llama, save_model, edit_tensors):
    model = llama(tie_word_embeddings=True)
    folder = save_model(model)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    checkpoint = import_checkpoint(local_store, str(folder))
    outer = checkpoint.read(checkpoint.outer_tensors())
    assert torch.equal(outer["model.embed_tokens.weight"], model.lm_head.weight)


def test_an_equal_copy_of_a_tied_embedding_is_kept_but_not_used(
    local_store, llama, save_model, edit_tensors, caplog
):
    folder = save_model(llama(tie_word_embeddings=True))
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    checkpoint = import_checkpoint(local_store, str(folder))
    assert "lm_head.weight" not in checkpoint.read(checkpoint.outer_tensors())
    assert "lm_head.weight" in [tensor.name for tensor in checkpoint.source_tensors()[None]]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_names_saved_from_the_base_model_are_found(local_store, llama, save_model):
    base = LlamaModel(llama(tie_word_embeddings=True).config)
    checkpoint = import_checkpoint(local_store, str(save_model(base)))
    assert_same(all_weights(checkpoint), {f"model.{name}": t for name, t in base.state_dict().items()})
    assert checkpoint.layer_tensors(1)["mlp.up_proj.weight"].name == "layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: re.sub(r"(layers\.\d+)", r"\1._checkpoint_wrapped_module", name),
        lambda name: re.sub(r"(layers\.\d+)", r"_fsdp_wrapped_module.\1._orig_mod", name),
    ],
    ids=["compiled", "DDP", "both", "checkpointed", "FSDP"],
)
def test_wrappers_are_removed_from_names(local_store, llama, save_model, edit_tensors, caplog, wrapped):
    model = llama()
    plain = import_checkpoint(local_store, str(save_model(model, "plain")))
    folder = save_model(model, f"wrapped {uuid.uuid4()}")

    def rename(tensors) -> None:
        for name in list(tensors):
            tensors[wrapped(name)] = tensors.pop(name)

    edit_tensors(folder, rename)
    inspect_source(str(folder))
    checkpoint = import_checkpoint(local_store, str(folder))
    assert_same(all_weights(checkpoint), model.state_dict())
    assert checkpoint.identity == plain.identity
    assert len([record for record in caplog.records if "of 21 tensors" in record.getMessage()]) == 1


def test_code_next_to_a_known_model_is_not_used_and_one_warning_says_so(
    local_store, save_model, edit_config, caplog
):
    folder = save_model(name=f"own code {uuid.uuid4()}")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "own.Own"})
    (folder / "own.py").write_text("raise SystemExit('run')")
    inspect_source(str(folder))
    import_checkpoint(local_store, str(folder))
    messages = [record.getMessage() for record in caplog.records]
    assert len([text for text in messages if "never run" in text and "'llama'" in text]) == 1


def test_infinities_written_by_transformers_are_read_as_numbers(local_store, save_model):
    sizes = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    layers = {
        "num_hidden_layers": 2,
        "attn_layer_indices": [1],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = BambaConfig(**sizes, **layers, hidden_size=32, intermediate_size=48, vocab_size=97)
    folder = save_model(BambaForCausalLM(config))
    written = (folder / "config.json").read_bytes()
    assert b"__float__" in written
    checkpoint = import_checkpoint(local_store, str(folder))
    assert list(checkpoint.config.time_step_limit) == [0.0, float("inf")]
    assert local_store.read(checkpoint.artifact, "config.json") == written


def test_buffers_that_the_model_computes_are_indexed_but_not_loaded(
    local_store, save_model, edit_tensors, caplog
):
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    folder = save_model(model)
    edit_tensors(folder, lambda t: t.update({"h.1.attn.bias": torch.ones(16, 16, dtype=torch.bool)}))
    checkpoint = import_checkpoint(local_store, str(folder))
    state = model.state_dict()
    del state["lm_head.weight"]  # tied
    assert_same(all_weights(checkpoint), state)
    (buffer,) = [tensor for tensor in checkpoint.source_tensors()[1] if tensor.model_name is None]
    assert buffer.name == "h.1.attn.bias"
    assert torch.equal(checkpoint.read({"mask": buffer})["mask"], torch.ones(16, 16, dtype=torch.bool))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_tensors_that_the_model_does_not_use_are_named_in_a_warning(
    local_store, save_model, edit_tensors, caplog
):
    folder = save_model()
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    with caplog.at_level(logging.WARNING):
        import_checkpoint(local_store, str(folder))
    assert "model.layers.0.self_attn.q_proj.bias" in caplog.text


def test_the_identity_depends_on_the_weights_and_not_on_their_files(tmp_path, local_store, llama, save_model):
    torch.manual_seed(5)
    model = llama()
    one = import_checkpoint(local_store, str(save_model(model, "one")))
    shards = import_checkpoint(local_store, str(save_model(model, "shards", max_shard_size="30KB")))
    assert one.artifact.key != shards.artifact.key
    assert one.identity == shards.identity == one.artifact.facts["identity"]
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    assert import_checkpoint(local_store, str(save_model(model, "changed"))).identity != one.identity


def test_other_files_in_the_folder_do_not_change_the_import(local_store, save_model):
    folder = save_model()
    first = import_checkpoint(local_store, str(folder)).artifact
    (folder / "README.md").write_text("new")
    assert import_checkpoint(local_store, str(folder)).artifact == first
    config = folder / "config.json"
    config.write_bytes(config.read_bytes())
    assert import_checkpoint(local_store, str(folder)).artifact == first
    config.write_bytes(config.read_bytes() + b"\n")
    assert import_checkpoint(local_store, str(folder)).artifact.key != first.key


def test_a_copy_of_a_large_model_is_imported_again_with_the_same_identity(
    tmp_path, local_store, llama, save_model
):
    folder = save_model(llama(vocab_size=3000, hidden_size=256))
    assert (folder / "model.safetensors").stat().st_size > WHOLE
    shutil.copytree(folder, tmp_path / "copy")
    first, copy = (import_checkpoint(local_store, str(place)) for place in (folder, tmp_path / "copy"))
    assert first.artifact.key != copy.artifact.key
    assert (first.identity, first.tokenizer_identity) == (copy.identity, copy.tokenizer_identity)
    for checkpoint, place in ((first, folder), (copy, tmp_path / "copy")):
        assert import_checkpoint(local_store, str(place)).artifact == checkpoint.artifact


def test_inspecting_a_model_reads_its_shapes_without_weights(save_model, llama):
    model = llama()
    index = inspect_source(str(save_model(model)))
    layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    assert index.layer_bytes == (layer, layer)
    assert index.outer_bytes == 2 * 97 * 32 * 4 + 32 * 4
    assert index.parameters == model.num_parameters()
    assert {tensor.entry.digest for tensor in index.tensors} == {None}


class OutOfOrder(MemoryFileSystem):
    """Memory storage that records the files whose tensors were read, and can fail on one of them."""

    protocol = "outoforder"
    reads: ClassVar[list[str]] = []
    failing = "nothing"

    def cat_file(self, path, start=None, end=None, **options):
        name = path.rsplit("/", 1)[-1]
        if start:  # headers are at the beginning
            if name == self.failing:
                raise PermissionError("out of order")
            self.reads.append(name)
        return super().cat_file(path, start, end, **options)


def test_an_import_counts_the_weights_that_it_read(local_store, llama, save_model):
    model = llama()
    facts = import_checkpoint(local_store, str(save_model(model))).artifact.facts
    assert facts["weights read, bytes"] == sum(weight.nbytes for weight in model.state_dict().values())


def test_an_interrupted_import_resumes_with_the_next_file(local_store, llama, save_model, monkeypatch):
    register_implementation("outoforder", OutOfOrder, clobber=True)
    shards = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    fs, path = open_filesystem("outoforder://interrupted")
    model = llama()
    fs.put(str(save_model(model, max_shard_size="30KB")), path, recursive=True)
    monkeypatch.setattr(OutOfOrder, "failing", shards[2])
    with pytest.raises(PermissionError):
        import_checkpoint(local_store, "outoforder://interrupted")
    assert set(OutOfOrder.reads) == set(shards[:2])
    OutOfOrder.reads.clear()
    monkeypatch.setattr(OutOfOrder, "failing", "nothing")
    checkpoint = import_checkpoint(local_store, "outoforder://interrupted")
    assert set(OutOfOrder.reads) == set(shards[2:])
    assert_same(all_weights(checkpoint), model.state_dict())
    OutOfOrder.reads.clear()
    import_checkpoint(local_store, "outoforder://interrupted")
    assert not OutOfOrder.reads
