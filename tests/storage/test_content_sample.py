"""Content samples: different content gives different digests, and few bytes are read for files of any size."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from layerwise.storage.content_sample import sample_contents
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.formats.safetensors_header import encode_header

LOCAL = LocalFileSystem()
MIB = 1 << 20


def digest_of(path: Path) -> str:
    return sample_contents(LOCAL, {str(path): path.stat().st_size})[str(path)].digest


def model_file(path: Path, tensors: int, columns: int) -> list[tuple[int, int]]:
    """Write a safetensors file of zeros that takes no disk space; return begin and end of each tensor."""
    shapes = {f"model.layers.{number}.weight": ("BF16", (1024, columns)) for number in range(tensors)}
    header, entries = encode_header(shapes)
    spans = [(entry.offset, entry.offset + entry.nbytes) for entry in entries.values()]
    path.write_bytes(header)
    os.truncate(path, spans[-1][1])
    return spans


@pytest.mark.parametrize("tensors", [40, 41])
def test_every_tensor_is_sampled(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    spans = model_file(path, tensors, 512)
    original, digests = digest_of(path), set()
    for begin, end in spans:
        with path.open("r+b") as file:
            file.seek(begin)
            file.write(b"\1" * (end - begin))
            file.flush()
            digests.add(digest_of(path))
            file.seek(begin)
            file.write(bytes(end - begin))
    assert len(digests - {original}) == tensors
    assert digest_of(path) == original


def test_the_digest_depends_on_names_and_shapes(tmp_path):
    digests = set()
    for number, shape in enumerate([(4096, 2048), (2048, 4096), (4096 * 2048,)]):
        header, entries = encode_header({"a.weight": ("BF16", shape)})
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(header)
        os.truncate(path, len(header) + entries["a.weight"].nbytes)
        digests.add(digest_of(path))
    assert len(digests) == 3


def test_the_digest_of_small_files_depends_on_every_byte(tmp_path):
    path = tmp_path / "model.safetensors"
    (_, end) = model_file(path, 3, 512)[-1]
    original = sample_contents(LOCAL, {str(path): end})[str(path)]
    for place in range(8, end, 100_003):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        changed = tmp_path / "changed"
        changed.write_bytes(content)
        assert digest_of(changed) != original.digest
    assert original.whole


def test_the_sample_covers_head_end_and_middle_of_files_of_any_format(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(8 * MIB))
    original = sample_contents(LOCAL, {str(path): path.stat().st_size})[str(path)]
    assert not original.whole
    for begin, size in [(30_000, 1), (8 * MIB - 100, 50), *((place * MIB, 30_000) for place in range(1, 8))]:
        with path.open("r+b") as file:
            file.seek(begin)
            file.write(b"\1" * size)
            file.flush()
            assert digest_of(path) != original.digest
            file.seek(begin)
            file.write(bytes(size))


def test_named_files_are_read_completely_next_to_large_files(tmp_path):
    small, large = tmp_path / "tokenizer.json", tmp_path / "model.safetensors"
    model_file(large, 40, 512)
    small.write_bytes(bytes(5 * MIB))
    sizes = {str(path): path.stat().st_size for path in (small, large)}
    first = sample_contents(LOCAL, sizes, whole=[str(small)])
    assert [first[str(path)].whole for path in (small, large)] == [True, False]
    with small.open("r+b") as file:
        file.seek(3_456_789)
        file.write(b"\1")
    second = sample_contents(LOCAL, sizes, whole=[str(small)])
    assert second[str(small)] != first[str(small)]
    assert second[str(large)] == first[str(large)]


@pytest.mark.parametrize(
    ("files", "tensors", "columns", "most"),
    [(30, 24, 100_000, 4 * MIB), (100, 200, 1000, 11 * MIB)],
    ids=["147 GB in 720 tensors", "a mixture of 20,000 tensors"],
)
def test_the_bytes_read_are_bounded(tmp_path, files, tensors, columns, most):
    sizes = {}
    for number in range(files):
        path = tmp_path / f"model-{number:05}.safetensors"
        sizes[str(path)] = model_file(path, tensors, columns)[-1][1]
    read = bytes_read_by_this_process()
    sample_contents(LOCAL, sizes)
    assert 2 * MIB < bytes_read_by_this_process() - read < most


def bytes_read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_sample_is_the_same_on_every_storage(store, tmp_path):
    path = tmp_path / "model.safetensors"
    model_file(path, 5, 512)
    with path.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(os.urandom(MIB))
    store.fs.makedirs(store.root, exist_ok=True)
    store.fs.put_file(str(path), f"{store.root}/model.safetensors")
    (elsewhere,) = sample_contents(
        store.fs, {f"{store.root}/model.safetensors": path.stat().st_size}
    ).values()
    assert (elsewhere.digest, elsewhere.whole) == (digest_of(path), False)


@pytest.mark.parametrize(
    "damage",
    [lambda path: os.truncate(path, 4 * MIB), lambda path: path.write_bytes(b"")],
    ids=["cut off", "emptied"],
)
def test_a_file_that_became_shorter_is_refused(tmp_path, damage: Callable[[Path], object]):
    path = tmp_path / "model.safetensors"
    size = model_file(path, 8, 512)[-1][1]
    damage(path)
    with pytest.raises(Corrupt, match=r"model\.safetensors ends at byte"):
        sample_contents(LOCAL, {str(path): size})
