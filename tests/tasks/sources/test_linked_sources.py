"""Sources that are symbolic links, as in the hub's cache: links are followed, and broken ones are named."""

import json
import os
import shutil
from pathlib import Path

import pytest

from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.sources.file_identity import BrokenLink, SourceChanged
from layerwise.tasks.sources.model_source import find_source
from layerwise.tasks.texts.corpora import open_corpus, read_text


@pytest.fixture
def plain(save_model) -> Path:
    return save_model(max_shard_size="30KB")


@pytest.fixture
def snapshot(plain, tmp_path) -> Path:
    """The folder ``plain`` in the form of the hub's cache: every file is a link to a blob."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0123abcd", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copyfile(file, blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


def test_a_snapshot_of_the_hub_s_cache_is_the_same_model_as_the_plain_folder(local_store, plain, snapshot):
    first, second = import_checkpoint(local_store, str(plain)), import_checkpoint(local_store, str(snapshot))
    assert first.artifact == second.artifact
    assert len(list(second.layers())) == 2
    assert second.tokenizer()("hello world")["input_ids"] == [1, 2]


def test_a_link_to_a_snapshot_is_a_model_too(local_store, snapshot, tmp_path):
    (tmp_path / "linked").symlink_to(snapshot)
    assert import_checkpoint(local_store, str(tmp_path / "linked")).num_layers == 2


def test_a_linked_tokenizer_config_counts(local_store, plain, tmp_path):
    before = import_checkpoint(local_store, str(plain))
    config = plain / "tokenizer_config.json"
    config.rename(tmp_path / "elsewhere.json")
    config.symlink_to(tmp_path / "elsewhere.json")
    assert import_checkpoint(local_store, str(plain)).artifact == before.artifact
    document = json.loads(config.read_text())
    (tmp_path / "elsewhere.json").write_text(json.dumps(document | {"model_max_length": 7}))
    after = import_checkpoint(local_store, str(plain))
    assert after.tokenizer_identity != before.tokenizer_identity
    assert after.tokenizer().model_max_length == 7


def test_a_link_target_that_changes_during_a_run_stops_the_run(local_store, snapshot):
    checkpoint = import_checkpoint(local_store, str(snapshot))
    file = checkpoint.layer_tensors(1)["mlp.up_proj.weight"].file
    os.utime((snapshot / file).resolve(), ns=(1, 1))
    with pytest.raises(SourceChanged, match="has changed since this run began"):
        list(checkpoint.layers())


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "model-00002-of-00004.safetensors", "vocab.txt"]
)
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_without_a_target_is_named(plain, name, target):
    (plain / name).unlink(missing_ok=True)
    (plain / name).symlink_to(name if target == "itself" else "../blobs/nowhere")
    with pytest.raises(
        BrokenLink, match=rf"{name} is a symbolic link to .*, but its target does not exist.*cp -rL"
    ):
        find_source(str(plain))


def test_a_broken_link_that_the_import_does_not_need_is_ignored(local_store, plain):
    (plain / "README.md").symlink_to("nowhere")
    assert import_checkpoint(local_store, str(plain)).num_layers == 2


def test_a_link_to_a_folder_is_not_a_file(plain, tmp_path):
    (tmp_path / "folder").mkdir()
    (plain / "tokenizer.model").symlink_to(tmp_path / "folder")
    assert "tokenizer.model" not in find_source(str(plain)).folder.files


def test_links_to_gguf_files_and_texts_are_followed(tmp_path):
    for name, content in (("model.gguf", b"GGUF"), ("text.txt", b"Some words.")):
        (tmp_path / f"blob of {name}").write_bytes(content)
        (tmp_path / name).symlink_to(f"blob of {name}")
    assert find_source(str(tmp_path / "model.gguf")).identity["gguf"][:2] == ["model.gguf", 4]
    corpus = open_corpus(str(tmp_path / "text.txt"), "test")
    assert (corpus.name, corpus.size, read_text(corpus).content) == ("text.txt", 11, "Some words.")


@pytest.mark.parametrize("name", ["model", "model.gguf", "text.txt"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_source_that_is_itself_a_broken_link_is_named(tmp_path, name, target):
    link = tmp_path / name
    link.symlink_to(link if target == "itself" else "nowhere")
    with pytest.raises(BrokenLink, match=f"{name} is a symbolic link"):
        open_corpus(str(link), "test") if name == "text.txt" else find_source(str(link))
