"""A disk that fills up in the middle of a search, and one that becomes read-only; real ones, of a few hundred kB."""

import json
import os
import subprocess
import sys

import pytest

# Commands of layerwise and of the system in turns, in one process, as importing torch takes seconds.
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
    """What each command printed, with its exit code at the end."""
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
    assert "Free space, then start the same command again: it goes on from its last resume point." in full
    assert verified.startswith("1>")
    assert "nothing is damaged" in verified


def test_with_more_room_the_same_command_ends_well(said, finished):
    more, verified = said[2], said[3]
    assert verified.startswith("0>")
    assert finished[0].selection.verdict in more
    assert "nothing is damaged" in verified


def test_a_read_only_store_still_serves_what_it_has(said, finished):
    again = said[4]
    assert "Everything was in the store already" in again
    assert finished[0].selection.verdict in again


def test_what_is_not_in_a_read_only_store_is_refused_before_any_work(said):
    other, verified = said[5], said[6]
    assert "cannot be written: this is not allowed (Read-only file system)" in other
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


def test_a_server_without_room_for_its_database_says_so(tmp_path):
    """Its log, on the same disk, is empty."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        + [f'mount -t tmpfs -o size=16k none "{tmp_path}" && exec "$0" "$@"', sys.executable, "-c", START],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "has only 0.0 MB left. Free 20 MB, or set XDG_CACHE_HOME" in done.stdout, done.stderr
