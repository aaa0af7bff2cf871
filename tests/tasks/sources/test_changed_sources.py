"""Checkpoints that change during their import: versions are never mixed or stored under the wrong key."""

import os

import pytest

import layerwise.tasks.import_checkpoint as import_module
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.sources.file_identity import SourceChanged
from layerwise.tasks.sources.model_source import find_source
from tests.small_search import small_search


def test_a_gguf_file_that_is_rewritten_between_two_shards_is_refused_until_it_is_restored(
    local_store, tmp_path, monkeypatch
):
    path = small_search(tmp_path / "model", layers=4)["model"]
    with open(path, "rb") as file:
        good = file.read()
    times = os.stat(path)
    undisturbed = import_checkpoint(ArtifactStore(str(tmp_path / "other")), path)
    save_resume_point, written = import_module.Draft.save_resume_point, []

    def then_rewritten(draft, step, write_state):
        save_resume_point(draft, step, write_state)
        written.append(step)
        if len(written) == 2:
            half = len(good) // 2
            with open(path, "r+b") as file:
                file.write(good[:half] + bytes(byte ^ 1 for byte in good[half:]))

    with monkeypatch.context() as patch:
        patch.setattr(import_module.Draft, "save_resume_point", then_rewritten)
        with pytest.raises(SourceChanged, match="has changed since this run began"):
            import_checkpoint(local_store, path)
    with open(path, "r+b") as file:
        file.write(good)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert import_checkpoint(local_store, path).identity == undisturbed.identity


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_small_file_that_changes_during_the_import_is_refused(local_store, save_model, monkeypatch, name):
    folder = save_model()
    index_in_place = import_module.index_in_place

    def then_replaced(*arguments):
        index = index_in_place(*arguments)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content)  # the bytes are the same, but the time is not
        os.utime(folder / name, ns=(1, 1))
        return index

    monkeypatch.setattr(import_module, "index_in_place", then_replaced)
    with pytest.raises(SourceChanged, match=rf"{name} has changed since this run began"):
        import_checkpoint(local_store, str(folder))


def test_a_remote_file_that_is_replaced_before_its_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/model.gguf"
    fs, path = open_filesystem(url)
    fs.pipe_file(path, b"GGUF original")
    original = fs.store[path]
    source = find_source(url)
    fs.pipe_file(path, b"GGUF replaced")
    with pytest.raises(SourceChanged):
        source.local_gguf()
    fs.store[path] = original
    assert find_source(url).local_gguf().read_bytes() == b"GGUF original"
