"""Git LFS pointers in place of files are refused immediately, and named."""

import pytest

from layerwise.storage.files.filesystem import open_filesystem
from layerwise.tasks.import_checkpoint import import_checkpoint, inspect_source
from layerwise.tasks.sources.model_source import find_source
from layerwise.tasks.texts.corpora import open_corpus

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"


@pytest.mark.parametrize("backend", ["local", "memory"])
@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00004.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"],
)
def test_a_pointer_in_a_model_folder_is_refused(save_model, tmp_path, backend, name):
    folder = save_model(max_shard_size="30KB")
    (folder / name).write_text(POINTER)
    url = str(folder)
    if backend == "memory":
        url = f"memory://{tmp_path.name}/model"
        fs, path = open_filesystem(url)
        fs.put(str(folder), path, recursive=True)
    with pytest.raises(
        ValueError, match=rf"{name} of .*model is a Git LFS pointer.*`git lfs pull`.*`hf download"
    ):
        find_source(url)


def test_a_pointer_with_an_unusual_name_in_the_index_is_refused(save_model):
    folder = save_model(max_shard_size="30KB")
    index, shard = folder / "model.safetensors.index.json", "model-00001-of-00004.safetensors"
    index.write_text(index.read_text().replace(shard, "consolidated.safetensors"))
    (folder / shard).unlink()
    (folder / "consolidated.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=r"consolidated\.safetensors is a Git LFS pointer"):
        inspect_source(str(folder))


def test_a_pointer_in_place_of_an_unused_file_is_ignored(local_store, save_model):
    folder = save_model()
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md"):
        (folder / name).write_text(POINTER)
    assert import_checkpoint(local_store, str(folder)).num_layers == 2


@pytest.mark.parametrize("name", ["model.gguf", "text.txt", "rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_a_pointer_in_place_of_a_gguf_file_or_a_text_is_refused(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
        find_source(str(tmp_path / name)) if name.endswith("gguf") else open_corpus(
            str(tmp_path / name), "test"
        )
