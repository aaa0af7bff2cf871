"""Rates of transfers: measured where the weights are, without a trace and without a failure."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.models.transfer_rates import measure_transfers


@pytest.fixture
def model(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_and_a_local_store_have_all_rates(model, tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    checkpoint = import_checkpoint(store, str(model))
    before = store.fs.find(str(tmp_path), detail=True)
    rates = measure_transfers(store, str(model), None, checkpoint.index)
    assert min(rates.read, rates.imported, rates.written) > 0
    assert rates.read >= rates.imported
    assert store.fs.find(str(tmp_path), detail=True) == before


def test_a_store_that_keeps_what_is_written_is_not_written_to(model):
    store = ArtifactStore("memory://measured")
    checkpoint = import_checkpoint(store, str(model))
    rates = measure_transfers(store, str(model), checkpoint, checkpoint.index)
    assert rates.read > 0
    assert rates.written is None
    assert "Writing to the store is not in the estimate" in rates.notes[1]


def test_weights_that_cannot_be_read_have_no_rate(model, tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    checkpoint = import_checkpoint(store, str(model))
    (model / "model.safetensors").write_bytes(b"")
    rates = measure_transfers(store, str(model), checkpoint, checkpoint.index)
    assert rates.read is None
    assert rates.notes[0].startswith("Reading the model is not in the estimate: ")
