"""The source that a model name refers to."""

import logging
import os
import re
import socket

import pytest

from layerwise.storage.files.filesystem import open_filesystem
from layerwise.tasks.sources.demo_model import WHEEL_SHA256
from layerwise.tasks.sources.model_source import DemoSource, FolderSource, GgufSource, HubSource, find_source

COMMIT = "c0ffee" * 6 + "beef"


def test_the_identity_of_demo_needs_neither_disk_nor_network(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "untouched"))
    source = find_source("demo")
    assert isinstance(source, DemoSource)
    assert source.identity == {"wheel sha256": WHEEL_SHA256}
    assert not (tmp_path / "untouched").exists()


@pytest.mark.parametrize(
    "name", [f"some/model@{COMMIT}", f"hf://some/model@{COMMIT}", f"hf://some/model@{COMMIT}/"]
)
def test_a_full_commit_is_used_without_a_request(monkeypatch, name):
    with socket.socket() as nobody:  # bound, but not listening: any request would fail
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert find_source(name) == HubSource("some/model", COMMIT)


def test_a_local_folder_takes_precedence_over_a_hub_id(monkeypatch, tmp_path):
    (tmp_path / "some" / "model").mkdir(parents=True)
    (tmp_path / "some" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    source = find_source("some/model")
    assert isinstance(source, FolderSource)
    assert source.folder.root == str(tmp_path / "some" / "model")


def test_a_folder_is_identified_by_its_files_not_by_its_location(tmp_path):
    for place in ("here", "there"):
        fs, path = open_filesystem(f"memory://{tmp_path.name}/{place}")
        fs.pipe_file(f"{path}/config.json", b"{}")
        fs.pipe_file(f"{path}/README.md", place.encode())
    here, there = (find_source(f"memory://{tmp_path.name}/{place}").identity for place in ("here", "there"))
    assert (
        [file[:2] for file in here["files"]] == [file[:2] for file in there["files"]] == [["config.json", 2]]
    )
    assert tmp_path.name not in repr(here)


def test_a_replaced_file_on_memory_storage_is_another_model(tmp_path):
    url = f"memory://{tmp_path.name}/model"
    fs, path = open_filesystem(url)
    fs.pipe_file(f"{path}/config.json", b"{1}")
    before = find_source(url).identity
    fs.pipe_file(f"{path}/config.json", b"{2}")
    assert find_source(url).identity != before


def test_a_replaced_object_on_s3_is_another_model(s3_bucket, tmp_path):
    url = f"s3://{s3_bucket}/{tmp_path.name}/model"
    fs, path = open_filesystem(url)
    fs.pipe_file(f"{path}/config.json", b"{1}")
    before = find_source(url).identity
    assert find_source(url).identity == before
    fs.pipe_file(f"{path}/config.json", b"{2}")
    assert find_source(url).identity != before


def test_a_gguf_file_is_found_by_path_and_by_url(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    fs, path = open_filesystem(f"memory://{tmp_path.name}")
    fs.pipe_file(f"{path}/tiny.gguf", b"GGUF")
    for name in (
        str(tmp_path / "tiny.gguf"),
        f"file://{tmp_path}/tiny.gguf",
        f"memory://{tmp_path.name}/tiny.gguf",
    ):
        source = find_source(name)
        assert isinstance(source, GgufSource)
        assert source.identity["gguf"][:2] == ["tiny.gguf", 4]


def test_a_remote_gguf_file_is_downloaded_once_and_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs, path = open_filesystem(f"memory://{tmp_path.name}")
    fs.pipe_file(f"{path}/tiny.gguf", b"GGUF")
    source = find_source(f"memory://{tmp_path.name}/tiny.gguf")
    local = source.local_gguf()
    assert local.read_bytes() == b"GGUF"
    fs.rm(path, recursive=True)
    assert source.local_gguf() == local
    assert [file.name for file in local.parent.iterdir() if file.suffix == ".gguf"] == ["tiny.gguf"]


def test_a_damaged_copy_of_a_remote_gguf_file_is_downloaded_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/tiny.gguf"
    fs, path = open_filesystem(url)
    fs.pipe_file(path, b"GGUF" + bytes(1000))
    local = find_source(url).local_gguf()
    local.write_bytes(bytes(1004))  # a power failure can leave this: the size is right, the content is not
    assert find_source(url).local_gguf().read_bytes() == b"GGUF" + bytes(1000)


@pytest.mark.parametrize("size", [100, 6 << 20])
@pytest.mark.parametrize("name", ["model.gguf", "folder/model.safetensors"])
def test_files_with_equal_names_sizes_and_times_are_distinguished_by_their_content(tmp_path, name, size):
    identities = []
    for place, byte in (("a", b"a"), ("b", b"b")):
        file = tmp_path / place / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"GGUF" + size * byte)
        os.utime(file, (315532800, 315532800))
        identity = find_source(str(file if name.endswith(".gguf") else file.parent)).identity
        # Without the times of change, because they are equal on some file systems.
        identities.append(re.sub(r" \d{18,}", "", repr(identity)))
    assert identities[0] != identities[1]
    assert len(identities[0]) == len(identities[1])


def test_the_identity_of_small_files_does_not_depend_on_location_or_time(tmp_path, s3_bucket):
    identities = set()
    for url in (str(tmp_path), f"memory://{tmp_path.name}", f"s3://{s3_bucket}/{tmp_path.name}"):
        fs, path = open_filesystem(url)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            fs.pipe_file(f"{path}/{name}", name.encode())
        identities.add(repr(find_source(url).identity))
    assert len(identities) == 1


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket/model",
        "simplecache::s3://key:hunter2@bucket/model",
        "https://hunter2@host/model.gguf",
        "https://host/model.gguf?X-Amz-Signature=hunter2",
        "https://host/model.gguf?size=1&access_token=hunter2",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url, caplog):
    with caplog.at_level(logging.DEBUG), pytest.raises(ValueError, match="contains credentials") as refusal:
        find_source(url)
    assert "hunter2" not in str(refusal.value) + caplog.text


@pytest.mark.parametrize("name", ["gpt2", "no/such/folder", "demo model", ""])
def test_an_unknown_model_name_is_refused(name):
    with pytest.raises(ValueError, match="neither a file or folder"):
        find_source(name)


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder, or it is empty"):
        find_source(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="is not a folder, or it is empty"):
        find_source(f"memory://{tmp_path.name}/nothing")


def test_a_missing_gguf_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no file memory://nowhere/tiny\.gguf"):
        find_source("memory://nowhere/tiny.gguf")


def test_a_single_weights_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="Give the folder"):
        find_source(str(tmp_path / "model.safetensors"))


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="nosuch:// URLs are not supported"):
        find_source("nosuch://somewhere/model")
