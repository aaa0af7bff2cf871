"""Headers are accepted only if their tensors fill the file exactly."""

import json
import re
import struct

import pytest
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from layerwise.storage.files.errors import Corrupt
from layerwise.storage.formats.safetensors_header import read_header
from layerwise.storage.tensors import read_entries


def file_of(header, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_entries_of_a_file_of_the_official_writer_are_in_the_order_of_the_data(tmp_path):
    tensors = {"b": torch.ones(3).bool(), "a": torch.arange(4.0), "e": torch.empty(0), "s": torch.ones(())}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    fs, path = LocalFileSystem(), str(tmp_path / "a.safetensors")
    entries = read_header(fs, path)
    read = read_entries(fs, path, entries)
    assert {name: read[name].tolist() for name in read} == {name: tensors[name].tolist() for name in tensors}
    assert sorted(entry.offset for entry in entries.values()) == [entry.offset for entry in entries.values()]
    assert all(entry.digest is None for entry in entries.values())


def test_a_header_longer_than_the_first_read_is_read(tmp_path):
    tensors = {f"a tensor with a rather long name {index}": torch.tensor([index]) for index in range(5000)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    fs, path = LocalFileSystem(), str(tmp_path / "a.safetensors")
    assert len(read_entries(fs, path, read_header(fs, path))) == 5000


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b"", "of 0 bytes begins with"),
        (b"1234567", "of 7 bytes begins with"),
        (file_of({}, b"", length=10**12), "header length of 1000000000000"),
        (file_of({}, b"", length=50), "header length of 50"),
        (file_of(b"[]"), "cannot be understood"),
        (file_of(b"{"), "cannot be understood"),
        (file_of(b'{"a": 1}'), "cannot be understood"),
        (file_of({"a": {"dtype": "F32", "shape": [2]}}), "cannot be understood"),
        (file_of({"a": tensor(0, 8, "F4", (16,))}), "the tensor type 'F4' is not one of"),
        (file_of({"a": tensor(0, 8, "F32", (3,))}), r"8 bytes for a F32 tensor of shape \[3\]"),
        (file_of({"a": tensor(0, 8, "F32", (-1, -2))}), "cannot exist"),
        (file_of({"a": tensor(0, 8, "F32", (2.0,))}), "cannot exist"),
        (file_of({"a": tensor(0, 8, "F32", (2, True))}), "cannot exist"),
        (file_of({"a": tensor(-4, 4, "F32", (2,))}), "cannot exist"),
        (file_of({"a": tensor(0, 4), "b": tensor(0, 4)}), "'b' at byte"),
        (file_of({"a": tensor(4, 8)}), "'a' at byte"),
        (file_of({"a": tensor(0, 4), "b": tensor(6, 10)}, bytes(10)), "'b' at byte"),
        (file_of({"a": tensor(0, 4)}), "its header describes"),
        (file_of({"a": tensor(0, 8, "F32", (2,))}, bytes(7)), "its header describes"),
        (
            file_of(b'{"a": %b, "a": %b}' % ((json.dumps(tensor(0, 8, "F32", (2,))).encode(),) * 2)),
            "a name occurs twice",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_does_not_fit_the_file_is_refused(tmp_path, content, finding):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(Corrupt, match=rf"{re.escape(str(path))} .*{finding}"):
        read_header(LocalFileSystem(), str(path))
