"""Checkpoints to watch: which folders are found, when they are complete, and what is refused."""

import shutil

import pytest

from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.sources.watched_checkpoints import Incomplete, watched_checkpoints

COMMIT = "c0ffee" * 6 + "beef"


@pytest.fixture
def look(local_store, tmp_path):
    """Return a function that lists the checkpoints in the folder "models", by their path in it."""

    def look():
        found = watched_checkpoints(str(tmp_path / "models"), local_store)
        return {each.model.removeprefix(f"{tmp_path}/models/"): each for each in found}

    return look


def test_a_sharded_checkpoint_is_incomplete_until_its_last_file(tmp_path, save_model, look):
    whole = save_model(name="models/whole", max_shard_size="20KB")
    content = look()["whole"].content()
    shards = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(shards) > 2
    new = tmp_path / "models" / "new"
    new.mkdir()
    shutil.copy(whole / "config.json", new)
    with pytest.raises(Incomplete, match=r"no \*.safetensors file"):
        look()["new"].content()
    shutil.copy(whole / shards[0], new)
    with pytest.raises(Incomplete, match=rf"1 of {len(shards)} shards and no model.safetensors.index.json"):
        look()["new"].content()
    shutil.copy(whole / "model.safetensors.index.json", new)
    with pytest.raises(Incomplete, match=rf"lacks {len(shards) - 1} of the {len(shards)} shards"):
        look()["new"].content()
    for name in shards[1:]:
        shutil.copy(whole / name, new)
    (new / shards[-1]).write_bytes((whole / shards[-1]).read_bytes()[:-1])
    with pytest.raises(Incomplete, match="is truncated"):
        look()["new"].content()
    shutil.copy(whole / shards[-1], new)
    early = look()["new"]
    assert early.content() != content  # the tokenizer is missing, and other small files
    for path in whole.glob("*.json"):
        shutil.copy(path, new)
    late = look()["new"]
    assert late.state != early.state
    assert late.content() == content
    assert late.state == look()["new"].state
    (new / "README.md").write_text("about it")
    assert late.state == look()["new"].state


def test_the_newest_commit_of_a_hub_model_has_the_content_of_its_files(local_store, hub):
    [found] = watched_checkpoints("tiny/llama", local_store)
    assert found.model == f"tiny/llama@{COMMIT}"
    content = found.content()
    (hub.folder / "README.md").write_text("a commit that changes no file of the model")
    [same] = watched_checkpoints("tiny/llama@main", local_store)
    assert (same.state, same.content()) == (found.state, content)
    with pytest.raises(ValueError, match="is one commit, which never changes"):
        watched_checkpoints(f"tiny/llama@{COMMIT}", local_store)


def test_what_cannot_be_watched_is_refused(tmp_path, local_store, s3_bucket):
    with pytest.raises(ValueError, match="demo is a single model"):
        watched_checkpoints("demo", local_store)
    with pytest.raises(ValueError, match="HTTP servers do not list files"):
        watched_checkpoints("https://example.org/models", local_store)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        watched_checkpoints(str(tmp_path / "missing"), local_store)
    for prefix in (tmp_path, tmp_path / "store" / "export"):
        prefix.mkdir(parents=True, exist_ok=True)
        with pytest.raises(ValueError, match="contain one another"):
            watched_checkpoints(str(prefix), local_store)
    in_bucket = ArtifactStore(f"s3://{s3_bucket}/watched/store")
    with pytest.raises(ValueError, match="contain one another"):
        watched_checkpoints(f"s3://{s3_bucket}/watched", in_bucket)
    assert watched_checkpoints(f"s3://{s3_bucket}/watched-too", in_bucket) == []
    fs, path = open_filesystem(f"s3://{s3_bucket}/watched-too")
    fs.pipe_file(f"{path}/model/config.json", b"{")
    [broken] = watched_checkpoints(f"s3://{s3_bucket}/watched-too", in_bucket)
    assert broken.model == f"s3://{s3_bucket}/watched-too/model"
    with pytest.raises(Incomplete, match="Expecting property name"):
        broken.content()
    fs.pipe_file(f"{path}/model/config.json", b"[" * 100_000)
    [nested] = watched_checkpoints(f"s3://{s3_bucket}/watched-too", in_bucket)
    with pytest.raises(Incomplete, match="nested too deeply"):
        nested.content()
