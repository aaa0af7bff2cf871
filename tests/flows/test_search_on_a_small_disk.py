"""Searches on real disks of a few hundred kB: one fills up during a search, one becomes read-only."""

import json
import os
import subprocess
import sys

import pytest

# Runs commands of layerwise and of the system alternately, in one process, as the import of torch takes seconds.
STEPS = """
import json, subprocess, sys
from layerwise.flows.cli.main import main

sys.stderr = sys.stdout
for step in json.loads(sys.argv[1]):
    code = 0
    if step[0] == "mount":
        subprocess.run(step, check=True)
        continue
    sys.argv = ["layerwise", *step]
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code
    print(f"<exit code {code or 0}>", flush=True)
"""


@pytest.fixture(scope="module")
def said(finished, workshop, prefect_backend, pytestconfig, tmp_path_factory) -> list[str]:
    """Output of each command, followed by its exit code."""
    disk = tmp_path_factory.mktemp("disk")
    needed = sum(artifact.size for artifact in finished[0].stages.values())
    options = [f"--{name.replace('_', '-')}={v}" for name, v in workshop.parameters(betas="0.1,0.25").items()]
    search = ["search", *options, "--store", f"{disk}/store"]
    verify = ["verify", f"{disk}/store"]
    steps = [
        *(search, verify),
        *(["mount", "-o", "remount,size=64m", str(disk)], search, verify),
        *(["mount", "-o", "remount,ro", str(disk)], search, [*search, "--seed=1"], verify),
    ]
    script = f'mount -t tmpfs -o size={needed // 2} none "{disk}" && exec "$0" "$@"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
        + [sys.executable, "-c", STEPS, json.dumps(steps)],
        cwd=pytestconfig.rootpath,
        env=os.environ | {"PREFECT_API_URL": prefect_backend, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("<exit code ")


def test_a_full_disk_is_named_and_leaves_a_valid_store(said):
    full, verified = said[0], said[1]
    assert "its disk or quota is full (No space left on device)" in full
    assert "Free space, then start the same command again: it continues from its last resume point." in full
    assert verified.startswith("1>")
    assert "nothing is damaged" in verified


def test_with_more_room_the_same_command_succeeds(said, finished):
    more, verified = said[2], said[3]
    assert verified.startswith("0>")
    assert finished[0].selection.verdict in more
    assert "nothing is damaged" in verified


def test_a_finished_search_in_a_read_only_store_is_reused(said, finished):
    again = said[4]
    assert "Everything was in the store already" in again
    assert finished[0].selection.verdict in again


def test_a_new_search_in_a_read_only_store_is_refused_before_any_work(said):
    other, verified = said[5], said[6]
    assert "is not allowed to (Read-only file system)" in other
    assert verified.startswith("1>")
    assert "nothing is damaged" in verified


START = """
import layerwise.flows
from layerwise.flows.orchestration.embedded_server import ServerStart

try:
    ServerStart().wait()
except ConnectionError as error:
    print(error)
"""


def test_an_error_names_the_missing_room_for_the_database_of_the_server(tmp_path):
    """The log of the server is on the same disk, and empty."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        + [f'mount -t tmpfs -o size=16k none "{tmp_path}" && exec "$0" "$@"', sys.executable, "-c", START],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "has only 0.0 MB left. Free 20 MB, or set XDG_CACHE_HOME" in done.stdout, done.stderr
