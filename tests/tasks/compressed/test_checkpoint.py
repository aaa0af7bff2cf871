"""Folders are refused that are not a compressed checkpoint, are damaged, or try to access files elsewhere."""

import copy
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from layerwise.tasks.compress import compress
from layerwise.tasks.compressed.checkpoint import load, load_packed, unpack_checkpoint
from layerwise.tasks.pages.model_card import ModelCard
from layerwise.tasks.running.execution import Execution

CARD = ModelCard("tiny/llama", None, "wanda", None, "atp", (0.5, 0.5, 0.5), 0.5)
LAYER = "compressed-00004-of-00006.safetensors"  # after embedding, norm and head


WRITTEN = []


@pytest.fixture
def written(request, tmp_path, tmp_path_factory):
    """A compressed checkpoint, the same for all tests."""
    if not WRITTEN:
        run = request.getfixturevalue("small_run")()
        exported = run.export(run.branch(0.0)[0])
        place = run.store.location(compress.fn(run.store, exported, CARD, Execution()))
        WRITTEN.append(shutil.copytree(place, tmp_path_factory.mktemp("written") / "compressed"))
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
    return WRITTEN[0]


@pytest.fixture
def folder(written, tmp_path):
    """Copy of the checkpoint, to be damaged by a test."""
    return shutil.copytree(written, tmp_path / "copy")


def change(folder, file, edit):
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)


def describe(folder, **changes):
    document = json.loads((folder / "compressed.json").read_text())
    (folder / "compressed.json").write_text(json.dumps(document | changes))


def document_of(folder):
    return json.loads((folder / "compressed.json").read_text())


def refused(folder, tmp_path, match):
    """Check that every reader refuses the folder with a one-line message and leaves no files."""
    before = sorted(tmp_path.rglob("*"))
    for refuse in (load, load_packed, lambda place: unpack_checkpoint(place, tmp_path / "unpacked")):
        with pytest.raises(ValueError, match=match) as error:
            refuse(folder)
        assert len(str(error.value).splitlines()) == 1
        assert len(str(error.value)) < 1500
    assert sorted(tmp_path.rglob("*")) == before


def test_an_ordinary_checkpoint_is_refused(save_model, tmp_path):
    refused(save_model(), tmp_path, "has no compressed.json")


def test_a_newer_version_is_refused(folder, tmp_path):
    describe(folder, version=2)
    refused(
        folder, tmp_path, "version 2, but this version of layerwise reads 'layerwise-compressed', version 1"
    )


def test_another_format_is_refused(folder, tmp_path):
    describe(folder, format="bitmask")
    refused(folder, tmp_path, "format 'bitmask'")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": "layerwise-compressed", "version": 1}',
        "[" * 100_000,
        '{"format": ' + "9" * 10_000 + "}",
        '{"version": 1, "version": 1}',
        "\x00\xff",
    ],
)
def test_a_damaged_description_is_refused(folder, tmp_path, content):
    (folder / "compressed.json").write_text(content)
    refused(folder, tmp_path, "compressed.json cannot be used")


def test_an_unknown_layout_is_refused(folder, tmp_path):
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
    refused(folder, tmp_path, "is float32 of shape")


NAMES = [
    "../secret.safetensors",
    "/tmp/secret.safetensors",
    "sub/compressed-00004-of-00006.safetensors",
    "sub\\compressed-00004-of-00006.safetensors",
    "compressed-00004-of-00006.safetensors\x00",
    "compressed-00004-of-00006.safetensors\n",
    "Compressed-00004-of-00006.safetensors",
    "compressed-٠٠٠٠٤-of-00006.safetensors",
    "compressed-/../../00004-of-00006.safetensors",
    "compressed.json",
    "config.json",
    "model.safetensors.index.json",
    "",
    ".",
    "..",
    "x" * 1_000_000,
    4,
    None,
    ["compressed-00004-of-00006.safetensors"],
]


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:30] for name in NAMES])
def test_an_invalid_file_name_in_the_description_is_refused(folder, tmp_path, name):
    secret = torch.ones(3, dtype=torch.int16)
    save_file({"secret": secret}, tmp_path / "secret.safetensors")  # the first name refers to this file
    document = document_of(folder)
    document["files"][3] = name
    for row in document["tensors"].values():
        row["file"] = name if row["file"] == LAYER else row["file"]
    describe(folder, **document)
    refused(folder, tmp_path, "is not a valid name of a file with tensors")
    describe(folder, files=[*document_of(folder)["files"][:3], LAYER])
    refused(folder, tmp_path, "which is not in the list of files|has the name")


def test_a_duplicate_in_the_list_of_files_is_refused(folder, tmp_path):
    describe(folder, files=[*document_of(folder)["files"], LAYER])
    refused(folder, tmp_path, "is empty or has duplicates")


@pytest.mark.parametrize("name", [LAYER, "compressed.json", "config.json", "tokenizer.json", "sparsity.json"])
def test_a_link_out_of_the_folder_is_refused_and_one_within_is_followed(folder, tmp_path, name):
    outside = tmp_path / "outside"
    (folder / "tokenizer.json").write_text("{}")
    (folder / name).rename(outside)
    (folder / name).symlink_to("../outside")
    refused(folder, tmp_path, "is a link to .*outside of the folder")
    (folder / name).unlink()
    outside.rename(folder / "inside")
    (folder / name).symlink_to("inside")
    unpack_checkpoint(folder, tmp_path / "unpacked")
    AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    assert not any(path.is_symlink() for path in (tmp_path / "unpacked").iterdir())


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links_to_blobs(folder, written, tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for path in sorted(blobs.iterdir()):
        blob = path.rename(blobs / f"blob-{path.name.encode().hex()}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    expected = load(written).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in load(snapshot).state_dict().items())
    unpack_checkpoint(snapshot, tmp_path / "unpacked")
    (tmp_path / "repo" / "elsewhere").write_bytes((snapshot / "config.json").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../elsewhere")
    refused(snapshot, tmp_path, "is a link to .*outside of the folder")


def test_a_path_that_is_not_a_regular_file_counts_as_missing(folder, tmp_path):
    (folder / LAYER).unlink()
    os.mkfifo(folder / LAYER)  # reading a FIFO would block
    refused(folder, tmp_path, f"lacks {LAYER}")


@pytest.mark.parametrize("name", ["config.json", "sparsity.json"])
def test_a_missing_small_file_is_named(folder, tmp_path, name):
    (folder / name).unlink()
    refused(folder, tmp_path, f"lacks {name}")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shape": [1 << 60, 1 << 60]}, "float32 of shape .*but its parts"),
        ({"shape": [-64, 32]}, "not two positive whole numbers"),
        ({"shape": [0, 0]}, "not two positive whole numbers"),
        ({"shape": ["64", 32]}, "not two positive whole numbers"),
        ({"shape": [64.0, 32]}, "not two positive whole numbers"),
        ({"shape": [True, 32]}, "not two positive whole numbers"),
        ({"shape": [64]}, "not two positive whole numbers"),
        ({"shape": {}}, "not two positive whole numbers"),
        ({"dtype": "float64"}, "has the dtype 'float64'"),
        ({"dtype": "__class__"}, "has the dtype '__class__'"),
        ({"dtype": ["float32"]}, "has the dtype"),
        ({"layout": {"bitmask": 1}}, "has the layout"),
        ({"layout": "semi_structured"}, "lacks the tensor '.*metadata'"),
        ({"file": "compressed-00005-of-00006.safetensors"}, "lacks the tensor"),
        ({"offset": 0}, r"not file, shape, dtype, layout"),
    ],
)
def test_an_invalid_value_for_a_weight_is_refused(folder, tmp_path, changes, message):
    document = document_of(folder)
    document["tensors"]["model.layers.0.mlp.up_proj.weight"] |= changes
    describe(folder, **document)
    refused(folder, tmp_path, message)


def test_a_tensor_in_two_files_is_refused(folder, tmp_path):
    norm = load_file(folder / LAYER)["model.layers.0.input_layernorm.weight"]
    other = document_of(folder)["files"][0]
    change(folder, other, lambda tensors: tensors.update({"model.layers.0.input_layernorm.weight": norm}))
    refused(folder, tmp_path, "two tensors for 'model.layers.0.input_layernorm.weight'")


def test_a_tensor_that_was_added_is_refused(folder, tmp_path):
    change(folder, LAYER, lambda tensors: tensors.update(extra=torch.ones(2)))
    refused(folder, tmp_path, "tensors were added or are missing")


def test_parts_of_a_weight_that_is_not_described_are_refused(folder, tmp_path):
    document = document_of(folder)
    del document["tensors"]["model.layers.0.mlp.up_proj.weight"]
    describe(folder, **document)
    refused(folder, tmp_path, "a part of a weight that compressed.json does not list")


def test_a_layer_of_another_model_is_refused(folder, tmp_path):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"intermediate_size": 40}))
    refused(folder, tmp_path, r"has the shape .*but config.json asks for")


def test_a_truncated_file_is_refused(folder, tmp_path):
    (folder / LAYER).write_bytes((folder / LAYER).read_bytes()[:-8])
    refused(folder, tmp_path, f"{LAYER}.*truncated, damaged")


def test_a_wrong_mask_in_the_last_file_leaves_no_partly_unpacked_folder(folder, tmp_path):
    last = document_of(folder)["files"][-1]  # all other files are unpacked before it

    def more(tensors):
        name = next(name for name in tensors if name.endswith(".mask"))
        tensors[name] = torch.full_like(tensors[name], 255)

    change(folder, last, more)
    refused(folder, tmp_path, "the mask marks")


VALUES = [None, True, -1, 0, 1 << 60, 1e308, "", "../x", "\x00", [], {}, [[[]]], "x" * 10_000, float("nan")]


def test_every_changed_or_removed_value_of_the_description_is_refused(folder, tmp_path):
    """Replace every value by several others, and remove it."""
    original = document_of(folder)
    original["tensors"] = dict(list(original["tensors"].items())[:2])
    original["files"] = original["files"][:2]
    draw = random.Random(0)
    for path in list(places(original)):
        for value in (*draw.sample(VALUES, 6), ...):
            document = copy.deepcopy(original)
            *above, last = path
            parent = document
            for step in above:
                parent = parent[step]
            if value is ...:
                del parent[last]
            else:
                parent[last] = value
            (folder / "compressed.json").write_text(json.dumps(document))
            with pytest.raises(ValueError, match="compressed.json|compressed-|lacks|tensors"):
                unpack_checkpoint(folder, tmp_path / "unpacked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def places(document, path=()):
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def test_completely_missing_weights_are_refused(folder, tmp_path):
    norm = "model.layers.0.input_layernorm.weight"
    change(folder, LAYER, lambda tensors: tensors.pop(norm))
    refused(folder, tmp_path, "tensors were added or are missing")
    sizes = document_of(folder)["sizes"]
    smaller = {name: sizes[name] - 32 * 4 for name in ("dense bytes", "compressed bytes")}
    describe(folder, sizes=sizes | smaller)
    refused(folder, tmp_path, f"lacks 1 of the .*{norm}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "asks for 1000000000 layers"),
        ({"hidden_size": -1}, "has -1 for hidden_size"),
        ({"vocab_size": 10**9}, r"has the shape .*config\.json asks for"),
        ({"hidden_act": "os.system"}, r"cannot be used with 'os\.system' for hidden_act"),
    ],
)
def test_a_configuration_that_does_not_match_the_weights_is_refused(
    folder, tmp_path, edit_config, changes, message
):
    edit_config(folder, **changes)
    refused(folder, tmp_path, match=message)


def test_a_folder_that_is_not_empty_is_refused_as_output(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        unpack_checkpoint(folder, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_new_folder_is_created_with_its_parents_and_an_empty_folder_is_used(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    usual = (tmp_path / "empty").stat().st_mode
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        unpack_checkpoint(folder, out)
        AutoModelForCausalLM.from_pretrained(out)
        assert out.stat().st_mode == usual
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "empty", "new"]


def test_a_file_at_the_output_path_is_not_overwritten(folder, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        unpack_checkpoint(folder, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_loader_in_compressed_md_reads_no_file_outside_of_the_folder(folder, tmp_path):
    code = (folder / "COMPRESSED.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, loader := {})
    assert loader["read_weights"](folder).keys() == load(folder).state_dict().keys()
    save_file({"secret": torch.ones(3)}, tmp_path / "secret.safetensors")
    describe(folder, files=["../secret.safetensors"])
    with pytest.raises(ValueError, match="is not a file of this folder"):
        loader["read_weights"](folder)
