"""Folders of the embedded server: locks, and removal of old folders."""

import fcntl
import os
import time
from pathlib import Path
from threading import Thread

import pytest

from layerwise.flows.orchestration.server_home import UNUSED_DAYS, ServerHome, remove_old_homes


def age(folder: Path, days: float) -> None:
    """Make the folder look as if it was last used this many days ago."""
    then = time.time() - days * 24 * 3600
    os.utime(folder.with_name(f"{folder.name}.lock"), (then, then))


@pytest.fixture
def home(tmp_path):
    """Make a folder that was used once and is not in use."""

    def make(name: str) -> Path:
        with ServerHome(tmp_path / name, own=True, limit=1) as used:
            pass
        os.close(*used.lock)
        return tmp_path / name

    return make


def test_only_old_unused_folders_of_other_versions_are_removed(home, tmp_path):
    current, old, recent = home("prefect-3.9.0"), home("prefect-3.8.8"), home("prefect-3.8.9")
    in_use, foreign = home("prefect-3.7.0"), tmp_path / "SmolLM2"
    foreign.mkdir()
    for folder in (current, old, in_use):
        age(folder, UNUSED_DAYS + 1)
    age(recent, UNUSED_DAYS - 1)
    with open(tmp_path / "prefect-3.7.0.lock", "r+") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        remove_old_homes(current)
    left = {folder for folder in tmp_path.iterdir() if folder.is_dir()}
    assert left == {current, recent, in_use, foreign}


def test_the_first_start_is_exclusive_and_later_ones_are_not(tmp_path):
    folder = tmp_path / "prefect-3.8.8"
    order = []

    def second() -> None:
        with ServerHome(folder, own=True, limit=30):
            order.append("second")

    with ServerHome(folder, own=True, limit=30):
        other = Thread(target=second)
        other.start()
        other.join(0.5)
        order.append("first")
    other.join(30)
    assert order == ["first", "second"]
    with ServerHome(folder, own=True, limit=1), ServerHome(folder, own=True, limit=1):
        pass


def test_after_a_failed_first_start_the_folder_is_unlocked(tmp_path):
    with pytest.raises(ConnectionError), ServerHome(tmp_path / "home", own=True, limit=1):
        raise ConnectionError("it did not start")
    with ServerHome(tmp_path / "home", own=True, limit=1):
        pass


def test_waiting_for_another_start_has_a_time_limit(tmp_path):
    with (
        ServerHome(tmp_path / "home", own=True, limit=1),
        pytest.raises(TimeoutError, match="another process"),
        ServerHome(tmp_path / "home", own=True, limit=0.2),
    ):
        pass
