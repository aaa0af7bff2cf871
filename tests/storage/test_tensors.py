"""Tensors are read as they were written, or an error is raised."""

import pytest
import safetensors.torch
import torch

from layerwise.storage.files.errors import Corrupt
from layerwise.storage.files.filesystem import is_local
from layerwise.storage.formats.tensor_entry import DTYPES, dtype_name
from layerwise.storage.stage import Stage
from layerwise.storage.tensors import needed_bytes, read_entries, read_tensors, write_tensors

STAGE = Stage("layer", version=1)
FILE = "layer.safetensors"
MANY = {
    "gate": torch.tensor([True, False, True]),  # 3 bytes, after which the next tensor could be unaligned
    "weight": torch.arange(15, dtype=torch.bfloat16).view(3, 5),
    "scale": torch.tensor(2.5),
    "nothing": torch.empty(0, 7),
    "count": torch.tensor([2**40, -1]),
    "transposed": torch.arange(6.0).view(2, 3).T,
}


def write(store, tensors, **kwargs):
    return store.get_or_build(STAGE, lambda draft: write_tensors(draft, FILE, tensors, **kwargs))


def path_of(store, artifact):
    return f"{store.root}/{artifact.files[FILE].path}"


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert actual[name].reshape(-1).tolist() == tensor.reshape(-1).tolist()


def flip(store, path, offset):
    content = bytearray(store.fs.cat_file(path))
    content[offset] ^= 1
    store.fs.pipe_file(path, bytes(content))


def test_tensors_of_every_shape_are_read_as_written(store):
    assert_equal(read_tensors(store, write(store, MANY), FILE), MANY)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_bit_by_bit(store, name):
    dtype, itemsize = getattr(torch, DTYPES[name][0]), DTYPES[name][1]
    assert (dtype.itemsize, dtype_name(dtype)) == (itemsize, name)
    bits = torch.tensor([0, 1] * 8, dtype=torch.uint8)  # valid bytes for every type, including bool
    written = bits.view(dtype)
    read = read_tensors(store, write(store, {"a": written}), FILE)["a"]
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), bits)


def test_the_official_reader_reads_these_files(store, tmp_path):
    artifact = write(store, MANY, metadata={"format": "pt"})
    (tmp_path / FILE).write_bytes(store.read(artifact, FILE))
    assert_equal(safetensors.torch.load_file(tmp_path / FILE), MANY)
    for entry in artifact.files[FILE].tensors.values():  # some readers map the file into memory
        assert entry.offset % entry.torch_dtype.itemsize == 0
    with safetensors.safe_open(tmp_path / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_some_tensors_are_read_by_name(store):
    artifact = write(store, MANY)
    some = read_tensors(store, artifact, FILE, ["scale", "gate"])
    assert_equal(some, {"scale": MANY["scale"], "gate": MANY["gate"]})


def test_unknown_files_and_tensors_are_reported_with_the_known_ones(store):
    artifact = write(store, {"weight": torch.ones(1)})
    with pytest.raises(KeyError, match=r"has no tensor \['bias'\]; it has \['weight'\]"):
        read_tensors(store, artifact, FILE, ["weight", "bias"])
    with pytest.raises(KeyError, match=r"no file 'mask'; it has \['layer.safetensors'\]"):
        read_tensors(store, artifact, "mask")


def test_a_file_without_tensor_entries_is_refused(store):
    artifact = store.get_or_build(STAGE, lambda draft: draft.write("weights.bin", b"w"))
    with pytest.raises(KeyError, match="was not written by write_tensors"):
        read_tensors(store, artifact, "weights.bin")


def test_partial_reads_share_one_buffer_at_unaligned_offsets(store):
    written = {f"{index}": torch.full((index,), index, dtype=torch.uint8) for index in range(1, 90)}
    artifact = write(store, written)
    entries = artifact.files[FILE].tensors
    buffer = torch.empty(4096, dtype=torch.uint8)
    for names in (["3", "88", "17"], ["89"], ["1", "2"]):
        some = {name: entries[name] for name in names}
        tensors = read_entries(store.fs, path_of(store, artifact), some, buffer)
        assert_equal(tensors, {name: written[name] for name in names})
        for tensor in tensors.values():
            assert tensor.untyped_storage().data_ptr() == buffer.data_ptr()
            assert tensor.storage_offset() % 64 == 0


def test_tensors_far_apart_are_read_without_the_bytes_between_them(store):
    tensors = {"first": torch.ones(3), "middle": torch.zeros(3 << 20).byte(), "last": torch.ones(2).bool()}
    artifact = write(store, tensors)
    entries = artifact.files[FILE].tensors
    some = {name: entries[name] for name in ("last", "first")}
    assert needed_bytes(some) == 128
    assert_equal(read_tensors(store, artifact, FILE, some), {name: tensors[name] for name in some})


def test_a_tensor_longer_than_one_request_is_read_completely(store):
    weight = torch.randint(0, 256, (37 << 20,), dtype=torch.uint8)
    artifact = write(store, {"weight": weight, "bias": torch.ones(2)})
    assert torch.equal(read_tensors(store, artifact, FILE)["weight"], weight)


def test_a_buffer_that_is_too_small_is_refused_with_both_sizes(store):
    artifact = write(store, {"weight": torch.ones(65)})
    entries = artifact.files[FILE].tensors
    with pytest.raises(ValueError, match="buffer has 319 bytes, but these tensors need 320"):
        read_entries(store.fs, path_of(store, artifact), entries, torch.empty(319, dtype=torch.uint8))


@pytest.mark.parametrize(
    "buffer",
    [torch.empty(99), torch.empty(9, 99, dtype=torch.uint8), torch.empty(999, dtype=torch.uint8)[1:]],
    ids=["float", "matrix", "begins at an odd byte"],
)
def test_a_buffer_of_another_kind_is_refused(store, buffer):
    artifact = write(store, {"weight": torch.ones(1)})
    with pytest.raises(ValueError, match="contiguous one-dimensional uint8 tensor"):
        read_entries(store.fs, path_of(store, artifact), artifact.files[FILE].tensors, buffer)


def test_the_error_about_a_flipped_byte_names_the_tensor(store):
    artifact = write(store, {"up": torch.ones(4), "down": torch.ones(4)})
    flip(store, path_of(store, artifact), artifact.files[FILE].tensors["down"].offset + 5)
    with pytest.raises(Corrupt, match=r"layer\.safetensors: tensor 'down' has digest"):
        read_tensors(store, artifact, FILE)
    assert read_tensors(store, artifact, FILE, ["up"])["up"].tolist() == [1, 1, 1, 1]


def test_a_truncated_tensors_file_is_detected(store, quick_retries):
    artifact = write(store, {"weight": torch.ones(400)})
    path = path_of(store, artifact)
    store.fs.pipe_file(path, store.fs.cat_file(path)[:-1])
    with pytest.raises(Corrupt, match=r"layer\.safetensors.* truncated"):
        read_tensors(store, artifact, FILE)


def test_a_missing_tensors_file_is_detected(store):
    artifact = write(store, {"weight": torch.ones(4)})
    store.fs.rm_file(path_of(store, artifact))
    with pytest.raises(Corrupt, match=r"its file 'layer\.safetensors' .* is missing"):
        read_tensors(store, artifact, FILE)


def test_equal_tensors_give_equal_files_in_any_memory_layout(store):
    weight = torch.arange(6.0).view(2, 3)
    first = write(store, {"weight": weight, "flag": torch.tensor([True])})
    pairs = [("weight", torch.nn.Parameter(weight.T.contiguous().T)), ("flag", torch.tensor([True]))]
    again = store.get_or_build(Stage("again", 1), lambda draft: write_tensors(draft, FILE, pairs))
    assert first.content == again.content


def test_an_unsupported_dtype_or_name_is_refused(store):
    with pytest.raises(TypeError, match="tensor 'a' is torch.complex128, which safetensors cannot hold"):
        write(store, {"a": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="a tensor is named '__metadata__'"):
        write(store, {"__metadata__": torch.ones(1)})
    assert store.find(STAGE) is None


def test_an_empty_file_is_read(store):
    assert read_tensors(store, write(store, {}), FILE) == {}


def test_the_manifest_records_the_place_of_a_tensor(store):
    artifact = write(store, {"weight": torch.tensor([1.5])})
    entry = artifact.files[FILE].tensors["weight"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("F32", (1,), 4)
    content = store.read(artifact, FILE)
    assert content[entry.offset :] == torch.tensor([1.5]).numpy().tobytes()
    assert is_local(store.fs) == store.location(artifact).startswith("/")
