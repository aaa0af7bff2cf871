"""Check of a storage by a temporary file: it measures, and leaves nothing behind."""

import os
import signal
import threading

import pytest

from layerwise.storage.files.publishing import publish
from layerwise.storage.files.storage_rates import measure_storage
from layerwise.storage.location import StoreLocation


def everything_in(store) -> list[str]:
    rows = store.fs.find(store.root, detail=True)
    return [
        name for name, row in rows.items() if row["type"] == "file"
    ]  # SeaweedFS also lists an empty folder


def test_a_store_is_measured_without_a_trace(store):
    rates = measure_storage(store.fs, f"{store.root}/new/folder")
    assert min(rates.written, rates.read) > 0
    assert everything_in(store) == []
    assert not store.is_local or not os.path.exists(store.root)


def test_a_check_that_fails_leaves_nothing_behind(store, monkeypatch):
    found = []

    def failing(*_):
        found.extend(everything_in(store))
        raise OSError("no answer")

    monkeypatch.setattr("layerwise.storage.files.storage_rates.read_exactly", failing)
    with pytest.raises(OSError, match="no answer"):
        measure_storage(store.fs, store.root)
    assert len(found) == 1
    assert everything_in(store) == []
    assert not store.is_local or not os.path.exists(store.root)


def test_ctrl_c_leaves_nothing_behind(store, monkeypatch):
    """It ended the wait for a request to S3, which then created the file after its deletion."""

    def interrupted(*arguments):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return publish(*arguments)

    monkeypatch.setattr("layerwise.storage.files.storage_rates.publish", interrupted)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            measure_storage(store.fs, store.root)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert everything_in(store) == []
    assert not store.is_local or not os.path.exists(store.root)


def test_a_folder_that_existed_stays(tmp_path):
    location = StoreLocation(str(tmp_path))
    measure_storage(location.fs, location.root)
    assert list(tmp_path.iterdir()) == []
