"""Folders that are no compressed checkpoint, or a damaged one, are refused."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tasks.compress import compress
from tasks.compressed_checkpoint import load, unpack_checkpoint
from tasks.execution import Execution
from tasks.model_card import ModelCard

CARD = ModelCard("tiny/llama", None, "wanda", None, "atp", (0.5, 0.5, 0.5), 0.5)
LAYER = "compressed-00004-of-00006.safetensors"  # after embedding, norm and head


@pytest.fixture
def folder(small_run, tmp_path):
    """A copy of a compressed checkpoint, to be damaged."""
    run = small_run()
    exported = run.export(run.branch(0.0)[0])
    place = run.store.location(compress.fn(run.store, exported, CARD, Execution()))
    return shutil.copytree(place, tmp_path / "copy")


def change(folder, file, edit):
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)


def describe(folder, **changes):
    document = json.loads((folder / "compressed.json").read_text())
    (folder / "compressed.json").write_text(json.dumps(document | changes))


def refused(folder, tmp_path, match):
    with pytest.raises(ValueError, match=match):
        load(folder)
    with pytest.raises(ValueError, match=match):
        unpack_checkpoint(folder, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked" / "model.safetensors.index.json").exists()


def test_an_ordinary_checkpoint_is_refused(save_model, tmp_path):
    refused(save_model(), tmp_path, "has no compressed.json")


def test_a_newer_version_is_refused(folder, tmp_path):
    describe(folder, version=2)
    refused(folder, tmp_path, "version 2, and this one reads 'layerwise-compressed', version 1")


def test_another_format_is_refused(folder, tmp_path):
    describe(folder, format="bitmask")
    refused(folder, tmp_path, "format 'bitmask'")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "layerwise-compressed", "version": 1}'])
def test_a_damaged_description_is_refused(folder, tmp_path, content):
    (folder / "compressed.json").write_text(content)
    refused(folder, tmp_path, "compressed.json cannot be used")


def test_a_layout_that_is_not_known_is_refused(folder, tmp_path):
    text = (folder / "compressed.json").read_text().replace('"bitmask"', '"csr"')
    (folder / "compressed.json").write_text(text)
    refused(folder, tmp_path, "layout 'csr'")


def test_a_missing_file_is_named(folder, tmp_path):
    (folder / LAYER).unlink()
    refused(folder, tmp_path, f"lacks {LAYER}")


def test_a_missing_tensor_is_named(folder, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight.mask"
    change(folder, LAYER, lambda tensors: tensors.pop(name))
    refused(folder, tmp_path, name)


def test_values_of_another_weight_are_refused(folder, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight.values"
    change(folder, LAYER, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
    refused(folder, tmp_path, "values")


def test_weights_of_another_dtype_are_refused(folder, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight.values"
    change(folder, LAYER, lambda tensors: tensors.update({name: tensors[name].half()}))
    refused(folder, tmp_path, "says float32")


def test_weights_that_are_missing_altogether_are_not_made_up(folder):
    change(folder, LAYER, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))
    with pytest.raises(ValueError, match=r"no weights for \['model.layers.0.input_layernorm.weight'\]"):
        load(folder)


def test_two_checkpoints_never_mix(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        unpack_checkpoint(folder, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]
