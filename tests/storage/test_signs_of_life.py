"""Signs of life: processes that work in a store are listed, and dead ones only for a limited time."""

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest
from fsspec.implementations.local import LocalFileSystem

from layerwise.storage.files.errors import Unreachable
from layerwise.storage.files.publishing import overwrite
from layerwise.storage.formats.document import read_sealed
from layerwise.storage.signs_of_life import (
    Sign,
    announced,
    doing,
    read_sign,
    remove_sign,
    running_processes,
    storage_clock,
)
from layerwise.storage.store import ArtifactStore
from tests.faults import error

NAME = "0123456789abcdef" * 2
MINUTES = 60.0
LIMIT = 60.0  # seconds of waiting for another thread or process
HOLDER = """
import sys, threading
from layerwise.storage.signs_of_life import announced
from layerwise.storage.store import ArtifactStore

store = ArtifactStore(sys.argv[1])
with announced(store, "a search"):
    print("announced", flush=True)
    threading.Event().wait()
"""


def files_of(store):
    rows = store.fs.find(store.root, detail=True)
    return {path: row for path, row in rows.items() if row["type"] == "file"}


def now_in(store):
    return storage_clock(store)


def running_in(store, later=0.0):
    return running_processes(store, now_in(store) + later)


def test_a_process_is_listed_while_it_works_and_leaves_nothing(store):
    with announced(store, "search demo at 0.5"):
        [process] = running_in(store)
        assert (process.host, process.pid, process.what) == (
            socket.gethostname(),
            os.getpid(),
            "search demo at 0.5",
        )
        assert process.since <= process.last_sign
    assert running_processes(store, 0.0) == []
    assert files_of(store) == {}


def test_a_process_that_fails_leaves_nothing(store):
    with pytest.raises(RuntimeError, match="out of memory"), announced(store, "a search"):
        raise RuntimeError("out of memory")
    assert files_of(store) == {}


def test_the_beginning_is_by_the_clock_of_the_storage(store):
    with announced(store, "first"):
        before = now_in(store)
        with announced(store, "second"):
            [process] = [each for each in running_in(store) if each.what == "second"]
            # Some storages round to whole seconds; it is never later than the first file that this process could write.
            assert before - 1.5 <= process.since.timestamp() <= now_in(store)


def test_later_signs_of_life_keep_the_beginning(store, monkeypatch):
    monkeypatch.setattr("layerwise.storage.signs_of_life.EVERY", 0.05)
    with announced(store, "a search"):
        [path] = files_of(store)
        first = read_sealed(store.fs, path)
        deadline = time.monotonic() + LIMIT
        while (later := read_sealed(store.fs, path))["token"] == first["token"]:
            assert time.monotonic() < deadline, "no further sign of life"
            time.sleep(0.02)
    assert later["since"] == first["since"]
    assert files_of(store) == {}


def test_several_processes_are_listed(store):
    with announced(store, "first"), announced(store, "second"):
        assert {process.what for process in running_in(store)} == {"first", "second"}


def wait_for_sign(store, wanted):
    deadline = time.monotonic() + LIMIT
    while not wanted(sign := read_sign(store, NAME)):
        assert time.monotonic() < deadline, f"the last sign is {sign}"
        time.sleep(0.02)
    return sign


def test_a_process_is_found_by_its_name_while_it_works(store):
    assert read_sign(store, NAME) is None
    with announced(store, "branch 0.1", NAME):
        sign = read_sign(store, NAME)
        assert sign == Sign(sign.token, socket.gethostname(), "", os.getpid())
        assert sign.token
        assert [process.what for process in running_in(store)] == ["branch 0.1"]
    assert read_sign(store, NAME) is None


def test_every_sign_has_a_new_token_and_the_current_activity(store, monkeypatch):
    monkeypatch.setattr("layerwise.storage.signs_of_life.EVERY", 0.05)
    with announced(store, "branch 0.1", NAME):
        first = read_sign(store, NAME)
        wait_for_sign(store, lambda sign: sign.token != first.token)
        doing("layer 3 of 30")
        second = wait_for_sign(store, lambda sign: sign.doing)
        assert (second.doing, second.host, second.pid) == ("layer 3 of 30", first.host, first.pid)
        assert [process.doing for process in running_in(store)] == ["layer 3 of 30"]
        doing("")
        wait_for_sign(store, lambda sign: not sign.doing)


def test_the_first_sign_has_the_current_activity(store):
    doing("reading the model")
    try:
        with announced(store, "a search"):
            assert [process.doing for process in running_in(store)] == ["reading the model"]
    finally:
        doing("")


@pytest.mark.parametrize("name", ["", "a" * 31, "A" * 32, f"../{'a' * 32}"])
def test_an_invalid_name_of_a_process_is_refused(store, name):
    if name:
        with (
            pytest.raises(ValueError, match="must be 32 hex digits"),
            announced(store, "x", name),
        ):
            pass
    with pytest.raises(ValueError, match="must be 32 hex digits"):
        read_sign(store, name)
    assert files_of(store) == {}


def test_a_damaged_sign_has_no_token_until_the_next_sign(store, monkeypatch):
    monkeypatch.setattr("layerwise.storage.signs_of_life.EVERY", 0.05)
    path = f"{store.root}/running/{NAME}.json"
    overwrite(store.fs, path, b"{")
    assert read_sign(store, NAME) == Sign("", "", "", 0)
    with announced(store, "branch 0.1", NAME):
        assert read_sign(store, NAME).pid == os.getpid()


def test_a_living_process_replaces_a_removed_sign(store, monkeypatch):
    monkeypatch.setattr("layerwise.storage.signs_of_life.EVERY", 0.2)
    remove_sign(store, NAME)
    with announced(store, "branch 0.1", NAME):
        first = read_sign(store, NAME)
        remove_sign(store, NAME)
        wait_for_sign(store, lambda sign: sign and sign.token != first.token)
    assert files_of(store) == {}


def test_reading_a_sign_is_one_request(fault_proxy, s3_bucket):
    store = ArtifactStore(f"s3://{s3_bucket}/one-request")

    def requests() -> int:
        return sum(request.path.startswith(f"/{store.root}") for request in fault_proxy.requests)

    assert read_sign(store, NAME) is None
    assert requests() == 1
    with announced(store, "branch 0.1", NAME):
        before = requests()
        assert read_sign(store, NAME).pid == os.getpid()
        assert requests() == before + 1


def test_a_storage_that_does_not_answer_is_not_the_end_of_a_process(fault_proxy, s3_bucket):
    store = ArtifactStore(f"s3://{s3_bucket}/silent", config_kwargs={"retries": {"total_max_attempts": 1}})
    fault_proxy.inject(error(503), times=float("inf"))
    with pytest.raises(Unreachable):
        read_sign(store, NAME)


def test_a_process_without_a_sign_for_ten_minutes_is_not_running(store):
    with announced(store, "a search"):
        assert len(running_in(store, later=9 * MINUTES)) == 1
        later = now_in(store) + 11 * MINUTES
        assert running_processes(store, later) == []
        [silent] = running_processes(store, later, within=12 * MINUTES)
        assert silent.pid == os.getpid()


def test_an_unreadable_sign_is_a_process_of_unknown_age(store):
    overwrite(store.fs, f"{store.root}/running/{'a' * 32}.json", b"{")
    [process] = running_in(store)
    assert process.since == datetime(1970, 1, 1, tzinfo=UTC)
    assert "is not readable" in process.what


def test_a_killed_process_is_listed_until_it_is_stale(tmp_path, pytestconfig):
    store = ArtifactStore(str(tmp_path / "store"))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.url],
        cwd=pytestconfig.rootpath,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "announced\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [each.pid for each in running_in(store)] == [process.pid]
    assert running_in(store, later=11 * MINUTES) == []


def test_work_continues_with_one_warning_where_nothing_can_be_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("layerwise.storage.signs_of_life.EVERY", 0.001)
    store = ArtifactStore(str(tmp_path / "store"))
    # Root may write everywhere.
    (tmp_path / "store").write_bytes(b"a file where the store's folder should be")
    done = []
    with caplog.at_level(logging.WARNING), announced(store, "a search"):
        time.sleep(0.05)  # for several attempts
        done.append("work")
    assert done == ["work"]
    [record] = caplog.records
    assert "the work continues, but `layerwise gc` does not know of it" in record.message


def test_reading_the_clock_leaves_nothing(store):
    with announced(store, "a search"):
        before = list(files_of(store))
        assert abs(now_in(store) - time.time()) < 5 * MINUTES
        assert list(files_of(store)) == before


def test_reading_the_clock_creates_no_folder(tmp_path):
    missing = ArtifactStore(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        now_in(missing)
    assert not (tmp_path / "missing").exists()


def test_reading_the_clock_keeps_an_empty_folder(tmp_path):
    store = ArtifactStore(str(tmp_path))
    assert abs(now_in(store) - time.time()) < 5 * MINUTES
    assert tmp_path.is_dir()


def test_a_sign_that_another_machine_replaces_during_the_reading_on_nfs_is_read_again(tmp_path, monkeypatch):
    store, read, failed = ArtifactStore(str(tmp_path)), LocalFileSystem.cat_file, []

    def replaced_once(fs, path, *args, **options):
        if not failed:
            failed.append(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(fs, path, *args, **options)

    with announced(store, "search", "5" * 32):
        monkeypatch.setattr(LocalFileSystem, "cat_file", replaced_once)
        assert read_sign(store, "5" * 32).host == socket.gethostname()
    assert failed
