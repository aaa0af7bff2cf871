"""Embedded Prefect server in processes of their own: its folder, its start and end, proxies, messages."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from socket import socket

import psutil
import pytest

from layerwise.flows.orchestration.embedded_server import prefer_quiet_prefect

# Start a server, print which one, wait for a line, and print how the server has ended.
USES_A_SERVER = """
import sys
from layerwise.flows.orchestration.embedded_server import ServerStart, death_of_embedded_server
from prefect.client.orchestration import get_client

server = ServerStart()
try:
    server.wait()
except ConnectionError as error:
    sys.exit(f"{error}")
with get_client(sync_client=True) as client:
    print("embedded" if server.embedded else "configured", client.api_url.port, client.api_version(), flush=True)
sys.stdin.readline()
print(death_of_embedded_server(), flush=True)
"""
OTHER_VERSION = "ffffffffffff"  # version of a database that no release of Prefect has


@dataclass(frozen=True)
class User:
    """User whose ~/.prefect has the database of another version of Prefect."""

    home: Path

    @property
    def database(self) -> Path:
        return self.home / ".prefect" / "prefect.db"

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    def start(self, **changes: str) -> subprocess.Popen:
        foreign = [
            name for name in os.environ if name.startswith("PREFECT_") or name.lower().endswith("_proxy")
        ]
        own = {name: value for name, value in os.environ.items() if name not in foreign}
        own |= {"HOME": str(self.home), "XDG_CACHE_HOME": str(self.cache), "PYTHONPATH": os.getcwd()}
        own |= {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300"}  # on a busy machine
        return subprocess.Popen(
            [sys.executable, "-c", USES_A_SERVER],
            cwd=self.home,
            env=own | changes,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def refused(self, **changes: str) -> str:
        """Return the error line of a process that finds no server."""
        out, err = self.start(**changes).communicate(timeout=360)
        assert out == ""
        (line,) = err.splitlines()
        return line


def make_database_of_another_version(folder: Path) -> None:
    folder.mkdir(parents=True)
    with sqlite3.connect(folder / "prefect.db") as database:
        database.execute("create table alembic_version (version_num varchar(32))")
        database.execute("insert into alembic_version values (?)", [OTHER_VERSION])


@contextmanager
def hanging_proxy() -> Iterator[str]:
    """Run a proxy that accepts connections and never answers."""
    with socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        yield f"http://127.0.0.1:{proxy.getsockname()[1]}"


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> User:
    user = User(tmp_path_factory.mktemp("user"))
    make_database_of_another_version(user.database.parent)
    return user


@dataclass(frozen=True)
class Using:
    """A process that uses a server, the line that it printed, and the process of its server."""

    process: subprocess.Popen
    said: str
    server: psutil.Process


@pytest.fixture(scope="module")
def first_starts(user) -> Iterator[list[Using]]:
    """Three processes of one user that start their first server at the same time; one is behind a proxy."""
    with hanging_proxy() as proxy:
        processes = [
            user.start(HTTP_PROXY=proxy, ALL_PROXY=proxy, no_proxy="x.example"),
            user.start(),
            user.start(),
        ]
        try:
            using = []
            for process in processes:
                said = process.stdout.readline()
                assert said, process.stderr.read()
                using.append(Using(process, said, psutil.Process(process.pid).children()[0]))
            yield using
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def test_simultaneous_first_starts_and_one_behind_a_proxy_all_succeed(first_starts):
    for each in first_starts:
        assert re.fullmatch(rf"embedded \d+ {re.escape(version('prefect'))}\n", each.said)


def test_each_version_of_prefect_has_its_own_folder(first_starts, user):
    assert (user.cache / "layerwise" / f"prefect-{version('prefect')}" / "prefect.db").exists()
    with sqlite3.connect(user.database) as database:
        assert database.execute("select * from alembic_version").fetchall() == [(OTHER_VERSION,)]
        assert database.execute("select count(*) from sqlite_master").fetchone() == (1,)


def test_the_server_ends_when_its_parent_is_killed(first_starts):
    killed = first_starts[0]
    killed.process.kill()
    killed.server.wait(timeout=15)
    assert not killed.server.is_running()


def test_the_server_ends_with_its_parent(first_starts):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # of a whole job, as by scancel
        first_starts[1].server.send_signal(number)
    said, _ = first_starts[1].process.communicate("\n", timeout=30)
    assert said == "None\n"
    assert not first_starts[1].server.is_running()


def test_the_end_of_a_server_is_noticed(first_starts):
    asking = first_starts[2]
    threads = f"/proc/{asking.server.pid}/task"
    asking.server.kill()
    # The parent can wait for it only when its last thread has ended; the process is already a zombie before.
    while asking.server.status() != psutil.STATUS_ZOMBIE or len(os.listdir(threads)) > 1:
        time.sleep(0.01)
    out, _ = asking.process.communicate("\n", timeout=120)
    assert re.match(r"Prefect's embedded server has ended \(exit code -9\)\. Its log is \S+\. Start", out)


def test_a_folder_chosen_by_the_user_is_used_and_not_repaired(user, tmp_path):
    make_database_of_another_version(tmp_path / "chosen")
    said = user.refused(PREFECT_HOME=str(tmp_path / "chosen"))
    assert f"Can't locate revision identified by '{OTHER_VERSION}'" in said
    assert (
        f"The database in {tmp_path}/chosen belongs to another version of Prefect. Unset PREFECT_HOME" in said
    )


def test_a_database_chosen_by_the_user_is_used(user, tmp_path):
    url = f"sqlite+aiosqlite:///{tmp_path}/nowhere/prefect.db"
    said = user.refused(PREFECT_API_DATABASE_CONNECTION_URL=url)
    assert "unable to open database file" in said


def test_the_server_of_the_users_profile_is_used(tmp_path):
    user = User(tmp_path)
    (tmp_path / ".prefect").mkdir()
    with socket() as taken:  # no process listens there
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/api"
        profiles = f'active = "lab"\n[profiles.lab]\nPREFECT_API_URL = "{url}"\n'
        (tmp_path / ".prefect" / "profiles.toml").write_text(profiles)
        began = time.monotonic()
        said = user.refused()
    assert said.startswith(f"the Prefect server at {url} does not answer (ConnectError: ")
    assert time.monotonic() - began < 60
    assert not user.cache.exists()


def test_settings_that_prefect_cannot_read_are_named_without_their_values(user):
    process = user.start(PREFECT_CLIENT_MAX_RETRIES="SECRET")
    _, err = process.communicate(timeout=60)
    line = err.splitlines()[-1]
    assert re.match(
        r"Prefect cannot read its settings \(.*max_retries.*\)\. Correct the variables PREFECT_", line
    )
    assert "SECRET" not in line


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({"HTTP_PROXY": "p", "NO_PROXY": "a.example"}, {"NO_PROXY": "a.example,127.0.0.1,localhost,::1"}),
        ({"all_proxy": "p"}, {"NO_PROXY": "127.0.0.1,localhost,::1"}),
        ({"https_proxy": "p", "no_proxy": "localhost"}, {"no_proxy": "localhost,127.0.0.1,::1"}),
        ({"HTTP_PROXY": "p", "no_proxy": "*"}, {"no_proxy": "*"}),
    ],
)
def test_this_machine_is_added_to_no_proxy_if_a_proxy_is_set(monkeypatch, before, after):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the function changes it
    prefer_quiet_prefect()
    assert {name: value for name, value in os.environ.items() if name.lower() == "no_proxy"} == after
