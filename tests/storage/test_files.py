"""Reading gives every byte that was asked for, or an error that names the range."""

import pickle
import sys

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from xxhash import xxh3_128_hexdigest

from storage.files import Corrupt, open_filesystem, read_exactly, read_scattered
from storage.stage import Stage
from storage.store import ArtifactStore
from storage.tensor_entry import TensorEntry
from storage.tensors import read_entries

CONTENT = bytes(range(256)) * 8


class Faulty(MemoryFileSystem):
    """A storage whose first answers are wrong: each fault is used once."""

    protocol = "faulty"
    cachable = False
    faults: list

    def cat_file(self, path, start=None, end=None, **kwargs):
        content = super().cat_file(path, start, end)
        return self.faults.pop(0)(content) if self.faults else content


def broken(content):
    raise ConnectionResetError("connection reset by peer")


def short(content):
    return content[:-1]


def whole(content):
    return CONTENT  # the Range header was ignored


@pytest.fixture
def faulty():
    fs = Faulty(global_store=False)
    fs.pipe_file("/file", CONTENT)
    return fs


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("faults", [[broken], [short], [whole], [short, broken, whole]])
def test_passing_faults_are_outlived(faulty, faults):
    faulty.faults = faults
    into = bytearray(100)
    read_exactly(faulty, "/file", 3, memoryview(into))
    assert into == CONTENT[3:103]


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("fault", [broken, short, whole])
def test_a_lasting_fault_is_an_error_that_names_path_and_range(faulty, fault):
    faulty.faults = [fault] * 99
    with pytest.raises(Corrupt, match="/file: bytes 3 to 103 could not be read in 4 attempts"):
        read_exactly(faulty, "/file", 3, memoryview(bytearray(100)))


def test_a_bit_flipped_on_the_way_is_read_again(faulty):
    store = ArtifactStore("memory://")
    store.fs, faulty.faults = faulty, []
    artifact = store.get_or_build(Stage("a", 1), lambda draft: draft.write("weights.bin", b"wwww"))
    faulty.faults = [lambda content: b"wxww"]
    assert store.read(artifact, "weights.bin") == b"wwww"


def test_a_tensor_with_a_bit_flipped_on_the_way_is_read_again(faulty):
    faulty.faults = [lambda content: b"wxww"]
    entry = TensorEntry("U8", (4,), 0, xxh3_128_hexdigest(CONTENT[:4]))
    assert read_entries(faulty, "/file", {"weight": entry})["weight"].tolist() == [0, 1, 2, 3]
    assert faulty.faults == []


@pytest.mark.usefixtures("quick_retries")
def test_reading_past_the_end_is_an_error(store):
    store.fs.makedirs(store.root, exist_ok=True)
    store.fs.pipe_file(f"{store.root}/file", CONTENT)
    for offset in (len(CONTENT) - 5, len(CONTENT) + 5):
        with pytest.raises(Corrupt, match=r"/file.* bytes \d+ "):
            read_exactly(store.fs, f"{store.root}/file", offset, memoryview(bytearray(10)))


def test_a_file_that_does_not_exist_is_reported_as_that(store):
    with pytest.raises(FileNotFoundError):
        read_exactly(store.fs, f"{store.root}/nothing", 0, memoryview(bytearray(10)))


def test_scattered_ranges_arrive_where_they_belong(store):
    store.fs.makedirs(store.root, exist_ok=True)
    content = CONTENT * (20 << 10)  # 40 MB: more than two requests
    store.fs.pipe_file(f"{store.root}/file", content)
    places = [(39 << 20, 77), (5, 1000), (3, 2), (1005, 18 << 20), (2048, 0)]
    buffers = [bytearray(size) for _, size in places]
    read_scattered(
        store.fs, f"{store.root}/file", [(p[0], memoryview(b)) for p, b in zip(places, buffers, strict=True)]
    )
    for (offset, size), buffer in zip(places, buffers, strict=True):
        assert buffer == content[offset : offset + size]


def test_a_password_in_the_url_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="holds a password") as error:
        open_filesystem("s3://key:geheim@bucket/run")
    assert "geheim" not in str(error.value)


def test_an_unknown_protocol_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no storage is known for floppy:// URLs. Use a folder, s3://"):
        open_filesystem("floppy://a")


def test_a_missing_package_is_named(monkeypatch):
    for name in ("s3", "s3a"):
        monkeypatch.delitem(_registry, name, raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ImportError, match="Install s3fs to access S3"):
        open_filesystem("s3://bucket")


def test_s3_is_patient_and_keeps_the_options_of_the_user():
    pytest.importorskip("s3fs")
    options = {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"read_timeout": 5}}
    fs, path = open_filesystem("s3://bucket/run", **options)
    assert path == "bucket/run"
    assert fs.retries == 12
    assert fs.config_kwargs["read_timeout"] == 5
    assert fs.config_kwargs["retries"]["total_max_attempts"] == 10


def test_an_error_travels_between_processes():
    assert str(pickle.loads(pickle.dumps(Corrupt("file is short")))) == "file is short"


def test_a_store_travels_between_processes_and_hides_its_options(store):
    assert pickle.loads(pickle.dumps(store)).root == store.root
    secret = ArtifactStore("s3://bucket/run", secret="geheim", key="k") if "s3fs" in sys.modules else store
    assert "geheim" not in repr(secret)
