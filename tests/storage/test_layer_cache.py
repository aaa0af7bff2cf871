"""The layer cache: what it keeps, what it gives up, and damage."""

import os
import shutil
import time

import fsspec
import pytest
from xxhash import xxh3_128_hexdigest

from layerwise.storage.layer_cache import ABANDONED, LayerCache


def tensor(number: int, size: int = 100) -> tuple[str, bytes]:
    content = bytes([number]) * size
    return xxh3_128_hexdigest(content), content


def add(cache: LayerCache, *numbers: int) -> None:
    for number in numbers:
        cache.add(*tensor(number))


def kept(cache: LayerCache, *numbers: int) -> list[int]:
    found = []
    for number in numbers:
        digest, content = tensor(number)
        into = bytearray(len(content))
        if cache.read(digest, memoryview(into)):
            assert into == content
            found.append(number)
    return found


def test_tensors_are_kept_for_other_processes(tmp_path):
    add(LayerCache(tmp_path / "cache"), 1, 2)
    assert kept(LayerCache(tmp_path / "cache"), 1, 2, 3) == [1, 2]


def test_a_full_cache_keeps_the_first_layers_of_a_pass_for_the_next(tmp_path):
    cache = LayerCache(tmp_path, 300)
    for _ in range(2):
        add(cache, *(number for number in range(5) if number not in kept(cache, *range(5))))
    assert kept(cache, *range(5)) == [0, 1, 2]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 300


def test_tensors_of_other_models_make_room_and_the_oldest_goes_first(tmp_path):
    add(LayerCache(tmp_path, 300), 1, 2, 3)
    for age, number in enumerate((3, 1, 2)):
        path = tmp_path / tensor(number)[0]
        os.utime(path, times=(time.time() - 100 + age,) * 2)
    cache = LayerCache(tmp_path, 300)
    add(cache, 4, 5)
    assert kept(cache, 1, 2, 3, 4, 5) == [2, 4, 5]


def test_a_tensor_larger_than_the_cache_deletes_nothing(tmp_path):
    add(LayerCache(tmp_path, 300), 1, 2, 3)
    cache = LayerCache(tmp_path, 300)
    cache.add(*tensor(9, 301))
    assert kept(cache, 1, 2, 3) == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"\1" * 99, b"\1" * 99 + b"\2", b""])
def test_a_damaged_tensor_is_deleted(tmp_path, damage):
    cache = LayerCache(tmp_path)
    add(cache, 1)
    (tmp_path / tensor(1)[0]).write_bytes(damage)
    assert kept(cache, 1) == []
    add(cache, 1)
    assert kept(cache, 1) == [1]


def test_an_interrupted_tensor_is_dropped_and_those_of_dead_processes_are_deleted(tmp_path):
    cache = LayerCache(tmp_path)

    def receive() -> None:
        with cache.receiving(100) as arriving:
            arriving.write(memoryview(b"half"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        receive()
    assert list(tmp_path.iterdir()) == []
    of_living, of_dead = tmp_path / f"{'a' * 32}.part", tmp_path / f"{'b' * 32}.part"
    of_living.touch()
    of_dead.touch()
    os.utime(of_dead, times=(time.time() - ABANDONED - 1,) * 2)
    LayerCache(tmp_path)
    assert list(tmp_path.iterdir()) == [of_living]


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        LayerCache(tmp_path / "file" / "cache")


def test_files_that_are_not_of_the_cache_are_left_alone(tmp_path):
    foreign = [tmp_path / "thesis.txt", tmp_path / "old.part", tmp_path / ("c" * 31)]
    for path in foreign:
        path.write_bytes(bytes(1000))
        os.utime(path, times=(0, 0))
    (tmp_path / ("d" * 32)).mkdir()
    (tmp_path / ("e" * 32)).symlink_to(foreign[0])
    cache = LayerCache(tmp_path, 150)
    add(cache, 1)
    cache = LayerCache(tmp_path, 150)
    add(cache, 2)
    assert kept(cache, 1, 2) == [2]
    assert all(path.exists() for path in foreign)


@pytest.mark.parametrize("moment", ["before", "while a tensor arrives"])
def test_after_an_error_of_the_disk_the_cache_is_not_used(tmp_path, moment, caplog):
    cache = LayerCache(tmp_path / "cache")
    if moment == "before":
        shutil.rmtree(tmp_path / "cache")
        add(cache, 1)
    else:
        with cache.receiving(100) as arriving:
            arriving.write(memoryview(bytes(100)))
            shutil.rmtree(tmp_path / "cache")
            arriving.keep(tensor(0)[0])
    assert "is not used any more" in caplog.text
    assert not cache.serves(fsspec.filesystem("memory"), "/x")
    add(cache, 2)
    assert kept(cache, 1, 2) == []
    assert not (tmp_path / "cache").exists()
