"""Checkpoint: reading of layers, tokenizer, and refusal of files that changed since the import."""

import os
import threading
import time
import uuid

import pytest
import torch
from transformers import AutoTokenizer
from xxhash import xxh3_128_hexdigest

import layerwise.tasks.import_checkpoint as import_module
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.formats.canonical_json import digest
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.sources.file_identity import SourceChanged
from layerwise.tasks.sources.folder import list_folder


def test_the_tokenizer_comes_with_the_checkpoint(store, save_model):
    checkpoint = import_checkpoint(store, str(save_model()))
    assert checkpoint.tokenizer()("hello big world")["input_ids"] == [1, 0, 2]


def give_templates(folder):
    """Save several chat templates as transformers does: one in the folder, the others in a subfolder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "a default", "tool_use": "with tools", "rag": "with texts"}
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "rag.jinja").exists()
    return tokenizer.chat_template


def test_chat_templates_in_a_subfolder_come_with_the_checkpoint(store, save_model):
    folder = save_model()
    bare = import_checkpoint(store, str(folder))
    templates = give_templates(folder)
    checkpoint = import_checkpoint(store, str(folder))
    assert checkpoint.tokenizer().chat_template == templates
    assert checkpoint.identity == bare.identity
    assert checkpoint.tokenizer_identity != bare.tokenizer_identity
    (folder / "additional_chat_templates" / "rag.jinja").write_text("with other texts")
    assert import_checkpoint(store, str(folder)).tokenizer().chat_template["rag"] == "with other texts"


def test_chat_templates_in_a_subfolder_of_a_hub_repository_come_with_the_checkpoint(local_store, hub):
    templates = give_templates(hub.folder)
    assert import_checkpoint(local_store, "tiny/llama").tokenizer().chat_template == templates


def test_the_subfolder_of_chat_templates_may_be_a_link(local_store, save_model, tmp_path):
    folder = save_model()
    templates = give_templates(folder)
    (folder / "additional_chat_templates").rename(tmp_path / "templates")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    assert import_checkpoint(local_store, str(folder)).tokenizer().chat_template == templates


def test_the_tokenizer_identity_matches_existing_stores(store, save_model):
    checkpoint = import_checkpoint(store, str(save_model()))
    files = {
        name: xxh3_128_hexdigest(store.read(checkpoint.artifact, name))
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    assert checkpoint.tokenizer_identity == digest(files)


def test_a_missing_tokenizer_is_reported_when_it_is_needed(local_store, llama, tmp_path):
    llama().save_pretrained(tmp_path / "bare")
    checkpoint = import_checkpoint(local_store, str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="tokenizer_config.json next to the weights"):
        checkpoint.tokenizer()


def test_reading_can_start_at_any_layer_and_is_counted(local_store, llama, save_model):
    model = llama(num_hidden_layers=3)
    checkpoint = import_checkpoint(local_store, str(save_model(model)))
    ((_, last),) = enumerate(checkpoint.layers(first=2))
    assert torch.equal(last["mlp.up_proj.weight"], model.model.layers[2].mlp.up_proj.weight)
    assert checkpoint.bytes_read == sum(weight.nbytes for weight in model.model.layers[2].parameters())
    assert list(checkpoint.layers(first=3)) == []


def test_closing_the_layers_early_leaves_no_thread(local_store, save_model):
    before = set(threading.enumerate())  # a failed test may have left threads
    checkpoint = import_checkpoint(local_store, str(save_model()))
    layers = checkpoint.layers()
    next(layers)
    assert any(thread.name.startswith("layer-reader") for thread in set(threading.enumerate()) - before)
    layers.close()
    assert set(threading.enumerate()) - before == set()


def flip(file, place):
    """Change one bit of a file, and restore its times."""
    times = file.stat()
    time.sleep(0.02)  # two ticks of the kernel's clock for change times
    with file.open("r+b") as opened:
        opened.seek(place)
        (byte,) = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_weights_that_change_during_a_run_are_never_used_even_with_restored_times(local_store, save_model):
    folder = save_model()
    checkpoint = import_checkpoint(local_store, str(folder))
    flip(folder / "model.safetensors", checkpoint.layer_tensors(1)["mlp.down_proj.weight"].entry.offset)
    layers = checkpoint.layers()
    next(layers)
    with pytest.raises(Corrupt, match=r"model\.safetensors.*model\.layers\.1\.mlp\.down_proj\.weight"):
        next(layers)
    assert import_checkpoint(local_store, str(folder)).identity != checkpoint.identity


def test_a_hard_link_made_during_a_run_does_not_stop_it(local_store, save_model, tmp_path):
    folder = save_model()
    checkpoint = import_checkpoint(local_store, str(folder))
    time.sleep(0.02)
    os.link(folder / "model.safetensors", tmp_path / "backup")
    assert len(list(checkpoint.layers())) == 2


def test_a_file_that_changes_during_the_import_ends_it_even_with_restored_times(
    local_store, save_model, monkeypatch
):
    folder = save_model()
    index_in_place = import_module.index_in_place

    def then_changed(store, draft, folder_at_work):
        flip(folder / "model.safetensors", 50_000)
        return index_in_place(store, draft, folder_at_work)

    monkeypatch.setattr(import_module, "index_in_place", then_changed)
    with pytest.raises(SourceChanged, match=r"model\.safetensors has changed since this run began"):
        import_checkpoint(local_store, str(folder))


def test_one_changed_bit_in_a_large_file_gives_another_model_even_with_restored_times(
    local_store, llama, save_model
):
    folder = save_model(llama(vocab_size=3000, hidden_size=256))
    first = import_checkpoint(local_store, str(folder))
    flip(
        folder / "model.safetensors", first.outer_tensors()["model.embed_tokens.weight"].entry.offset + 70_000
    )
    second = import_checkpoint(local_store, str(folder))
    assert second.artifact.key != first.artifact.key
    assert second.identity != first.identity


def test_a_file_that_disappears_is_named(local_store, save_model):
    folder = save_model()
    checkpoint = import_checkpoint(local_store, str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceChanged, match=r"model\.safetensors has been removed"):
        list(checkpoint.layers())


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_checkpoint_that_changes_during_a_run_stops_it(local_store, save_model, change):
    folder = save_model()
    checkpoint = import_checkpoint(local_store, str(folder))
    layers = checkpoint.layers()
    next(layers)  # the second layer is being read, too
    file = folder / "model.safetensors"
    if change == "time":
        os.utime(file, ns=(1, 1))
    else:
        file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(
        SourceChanged, match=r"model\.safetensors has changed since this run began: from \d+ bytes"
    ):
        list(checkpoint.layers())


def test_a_checkpoint_replaced_on_s3_stops_the_run(local_store, save_model, s3_bucket):
    fs, place = open_filesystem(f"s3://{s3_bucket}/{uuid.uuid4().hex}")
    for file in save_model().iterdir():
        fs.put_file(str(file), f"{place}/{file.name}")
    checkpoint = import_checkpoint(local_store, f"s3://{place}")
    assert len(list(checkpoint.layers())) == 2
    content = bytearray(fs.cat_file(f"{place}/model.safetensors"))
    content[-1] ^= 1
    fs.pipe_file(f"{place}/model.safetensors", bytes(content))
    with pytest.raises(SourceChanged, match=r"model\.safetensors has changed since this run began"):
        list(checkpoint.layers())


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "nowhere.safetensors"])
def test_an_index_cannot_refer_to_files_outside_of_the_folder(save_model, tmp_path, name):
    (tmp_path / "secret").write_text("not for this program")
    fs, path = open_filesystem(str(save_model()))
    with pytest.raises(FileNotFoundError, match="has no file"):
        list_folder(fs, path, "the model").path(name)
