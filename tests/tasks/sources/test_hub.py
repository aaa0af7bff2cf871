"""Import from the Hugging Face Hub, tested with a small HTTP server that implements its interface."""

import logging
import socket
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerwise.tasks.import_checkpoint import import_checkpoint, inspect_source

COMMIT = "c0ffee" * 6 + "beef"


def assert_same_model(checkpoint, folder) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in checkpoint.read(checkpoint.outer_tensors()).items():
        assert torch.equal(weight, expected[name])
    for number, layer in enumerate(checkpoint.layers()):
        assert len(layer) == 9
        for name, weight in layer.items():
            assert torch.equal(weight, expected[f"model.layers.{number}.{name}"])


@pytest.mark.parametrize("name", ["tiny/llama", "tiny/llama@main", "hf://tiny/llama"])
def test_a_hub_model_is_copied_into_the_store_layer_by_layer(store, hub, name):
    checkpoint = import_checkpoint(store, name)
    assert_same_model(checkpoint, hub.folder)
    shards = sorted(file for file in checkpoint.artifact.files if file.endswith(".safetensors"))
    assert shards[:2] == ["layer-00000.safetensors", "layer-00001.safetensors"]
    assert checkpoint.artifact.recipe["settings"] == {"repo": "tiny/llama", "commit": COMMIT}
    assert checkpoint.artifact.facts["source"] == f"tiny/llama@{COMMIT}"
    assert store.read(checkpoint.artifact, "config.json") == (hub.folder / "config.json").read_bytes()


def test_a_hub_model_has_the_identity_of_the_same_files_on_disk(local_store, hub):
    from_hub = import_checkpoint(local_store, "tiny/llama")
    assert from_hub.identity == import_checkpoint(local_store, str(hub.folder)).identity


def test_an_imported_model_is_not_downloaded_again(local_store, hub):
    first = import_checkpoint(local_store, "tiny/llama")
    sent = hub.bytes_sent
    hub.requests.clear()
    assert import_checkpoint(local_store, "tiny/llama").artifact == first.artifact
    assert hub.requests == ["GET /api/models/tiny/llama"]
    assert import_checkpoint(local_store, f"tiny/llama@{COMMIT}").artifact == first.artifact
    assert hub.requests == ["GET /api/models/tiny/llama"]
    assert hub.bytes_sent == sent


@pytest.mark.usefixtures("quick_retries")
def test_an_interrupted_download_resumes_where_it_stopped(local_store, hub):
    root = Path(local_store.root)
    hub.out_of_order = lambda: any(root.rglob("layer-00000.safetensors"))
    with pytest.raises(OSError, match="HTTP status 418"):
        import_checkpoint(local_store, "tiny/llama")
    hub.out_of_order = lambda: False
    checkpoint = import_checkpoint(local_store, "tiny/llama")
    attempts = {name: file.path.split("/")[-2] for name, file in checkpoint.artifact.files.items()}
    assert len(list(root.rglob("layer-00000.safetensors"))) == 1
    assert attempts["layer-00000.safetensors"] != attempts["layer-00001.safetensors"]
    assert_same_model(checkpoint, hub.folder)


def test_inspecting_a_model_reads_only_headers(hub):
    assert inspect_source("tiny/llama").layer_bytes == (30976, 30976)


def test_a_missing_repository_is_reported(local_store, hub):
    with pytest.raises(FileNotFoundError, match=r"no model no/body.*HF_TOKEN"):
        import_checkpoint(local_store, "no/body")


def test_an_unknown_revision_is_reported(local_store, hub):
    with pytest.raises(FileNotFoundError, match=r"tiny/llama has no revision 'v7'"):
        import_checkpoint(local_store, "tiny/llama@v7")


def test_a_gated_repository_is_reported_before_anything_is_read(local_store, hub):
    hub.gated = True
    with pytest.raises(PermissionError, match=r"tiny/llama is gated.*Accept them"):
        import_checkpoint(local_store, "tiny/llama")
    assert hub.bytes_sent == 0


def test_a_token_opens_a_gated_repository_and_is_written_nowhere(local_store, hub, monkeypatch, caplog):
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    with caplog.at_level(logging.DEBUG):
        checkpoint = import_checkpoint(local_store, "tiny/llama")
    assert_same_model(checkpoint, hub.folder)
    manifest = local_store.fs.cat_file(f"{local_store.root}/{checkpoint.artifact.key}/manifest.json")
    index = local_store.read(checkpoint.artifact, "checkpoint.json")
    assert b"secret-token" not in manifest + index + caplog.text.encode()


def test_no_connection_is_reported(local_store, monkeypatch):
    with socket.socket() as nobody:  # bound, but not listening
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(ConnectionError, match=r"cannot be reached for tiny/llama.*<full commit>"):
            import_checkpoint(local_store, "tiny/llama")


def test_pickle_files_on_the_hub_are_refused(local_store, hub):
    for file in [*hub.folder.glob("*.safetensors"), hub.folder / "model.safetensors.index.json"]:
        file.unlink()
    (hub.folder / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*not read"):
        import_checkpoint(local_store, "tiny/llama")
