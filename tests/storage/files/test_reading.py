"""Reading returns every requested byte, or an error that names the range."""

import pickle
import sys
import traceback

import pytest
import requests
from aiohttp import ClientPayloadError
from botocore.exceptions import EndpointConnectionError
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from xxhash import xxh3_128_hexdigest

from layerwise.storage.files.errors import Corrupt, Unreachable, reaching
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.files.reading import read_blocks, read_exactly, read_scattered
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_entries

CONTENT = bytes(range(256)) * 8


class Faulty(MemoryFileSystem):
    """A storage whose first answers are wrong; each fault is used once."""

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
def test_temporary_faults_are_retried(faulty, faults):
    faulty.faults = faults
    into = bytearray(100)
    read_exactly(faulty, "/file", 3, memoryview(into))
    assert into == CONTENT[3:103]


@pytest.mark.usefixtures("quick_retries")
def test_only_the_wrong_blocks_of_several_files_are_read_again(faulty):
    faulty.pipe_file("/other", CONTENT[::-1])
    faulty.faults = [short, lambda content: content, broken, short]
    first, second, third = bytearray(10), bytearray(20), bytearray(1)
    blocks = {
        "/file": [(200, memoryview(second)), (3, memoryview(first))],
        "/other": [(5, memoryview(third))],
    }
    read_blocks(faulty, blocks)
    assert (first, second, third) == (CONTENT[3:13], CONTENT[200:220], CONTENT[::-1][5:6])
    assert faulty.faults == []


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("fault", [broken, short, whole])
def test_a_lasting_fault_is_unreachable_and_names_path_and_range(faulty, fault):
    faulty.faults = [fault] * 99
    with pytest.raises(Unreachable, match="bytes 3 to 103 of /file at faulty://"):
        read_exactly(faulty, "/file", 3, memoryview(bytearray(100)))
    assert len(faulty.faults) == 95


@pytest.mark.usefixtures("quick_retries")
def test_a_file_that_is_too_short_is_corrupt_even_after_other_faults(faulty):
    faulty.faults = [broken, short]
    with pytest.raises(Corrupt, match="/file ends at byte 2048, but bytes 2000 to 2100 are needed"):
        read_exactly(faulty, "/file", 2000, memoryview(bytearray(100)))


def test_a_refusal_is_not_retried_and_reported_once(faulty):
    def refused(content):
        raise PermissionError(13, "no")

    faulty.faults = [refused] * 99
    with (
        pytest.raises(PermissionError, match="/file at faulty:// was refused .*no.: the cred") as error,
        reaching(faulty, "/"),
    ):
        read_exactly(faulty, "/file", 3, memoryview(bytearray(100)))
    assert str(error.value).count("was refused") == 1
    assert len(faulty.faults) == 98


def test_errors_of_clients_name_path_and_server_and_hide_secrets(faulty):
    faulty.secret = "geheim"
    url = "http://user:geheim@host/file?signature=geheim"
    for error in (ClientPayloadError(url), EndpointConnectionError(endpoint_url=url), requests.Timeout(url)):
        with (
            pytest.raises(Unreachable, match="/file at faulty:// cannot be reached") as told,
            reaching(faulty, "/file"),
        ):
            raise error
        assert "geheim" not in "".join(traceback.format_exception(told.value))


def test_errors_that_are_not_about_the_storage_pass_unchanged(faulty):
    for error in (
        KeyError("a"),
        ValueError("b"),
        FileNotFoundError(2, "c"),
        Corrupt("d"),
        ZeroDivisionError(),
    ):
        with pytest.raises(type(error)) as passed, reaching(faulty, "/file"):
            raise error
        assert passed.value is error


def test_a_file_with_a_bit_flipped_in_transit_is_read_again(faulty):
    store = ArtifactStore("memory://")
    store.fs, faulty.faults = faulty, []
    artifact = store.get_or_build(Stage("a", 1), lambda draft: draft.write("weights.bin", b"wwww"))
    faulty.faults = [lambda content: b"wxww"]
    assert store.read(artifact, "weights.bin") == b"wwww"


def test_a_tensor_with_a_bit_flipped_in_transit_is_read_again(faulty):
    faulty.faults = [lambda content: b"wxww"]
    entry = TensorEntry("U8", (4,), 0, xxh3_128_hexdigest(CONTENT[:4]))
    assert read_entries(faulty, "/file", {"weight": entry})["weight"].tolist() == [0, 1, 2, 3]
    assert faulty.faults == []


@pytest.mark.usefixtures("quick_retries")
def test_reading_past_the_end_is_refused(store):
    store.fs.makedirs(store.root, exist_ok=True)
    store.fs.pipe_file(f"{store.root}/file", CONTENT)
    for offset in (len(CONTENT) - 5, len(CONTENT) + 5):
        with pytest.raises(Corrupt, match=r"/file.* bytes \d+ "):
            read_exactly(store.fs, f"{store.root}/file", offset, memoryview(bytearray(10)))


def test_a_missing_file_is_reported(store):
    with pytest.raises(FileNotFoundError):
        read_exactly(store.fs, f"{store.root}/nothing", 0, memoryview(bytearray(10)))


def test_scattered_ranges_fill_their_buffers(store):
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


def test_an_unknown_protocol_is_refused_with_the_supported_ones():
    with pytest.raises(ValueError, match="floppy:// URLs are not supported. Use a folder, s3://"):
        open_filesystem("floppy://a")


def test_a_missing_package_is_named(monkeypatch):
    for name in ("s3", "s3a"):
        monkeypatch.delitem(_registry, name, raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ImportError, match="Install s3fs to access S3"):
        open_filesystem("s3://bucket")


def test_s3_retries_longer_and_keeps_the_options_of_the_caller():
    pytest.importorskip("s3fs")
    options = {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"read_timeout": 5}}
    fs, path = open_filesystem("s3://bucket/run", **options)
    assert path == "bucket/run"
    assert fs.retries == 12
    assert fs.config_kwargs["read_timeout"] == 5
    assert fs.config_kwargs["retries"]["total_max_attempts"] == 10


@pytest.mark.parametrize("kind", [Corrupt, Unreachable])
def test_an_error_can_be_pickled(kind):
    copy = pickle.loads(pickle.dumps(kind("file is short")))
    assert type(copy) is kind
    assert str(copy) == "file is short"


def test_a_store_can_be_pickled_and_hides_its_options(store):
    assert pickle.loads(pickle.dumps(store)).root == store.root
    secret = ArtifactStore("s3://bucket/run", secret="geheim", key="k") if "s3fs" in sys.modules else store
    assert "geheim" not in repr(secret)
