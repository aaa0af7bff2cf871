"""Full and read-only disks: a clear error, no incomplete file, and the build continues when there is space."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from layerwise.storage.files.publishing import create_once, overwrite, publish
from layerwise.storage.stage import Stage

ROOT = Path(__file__).parents[3]
GO_ON = "then start the same command again: it continues from its last resume point."

PRELUDE = """
import json, os, subprocess, sys
from layerwise.storage.files.publishing import create_once, overwrite, publish
from layerwise.storage.store import ArtifactStore
from layerwise.storage.stage import Stage

disk = sys.argv[1]
store = ArtifactStore(f"{disk}/store")
stage, facts, errors = Stage("capture", 1), {}, {}

def failing(name, action):
    try:
        action()
    except OSError as error:
        errors[name] = [error.errno, str(error)]
    else:
        errors[name] = [0, "no error"]

def files():
    return sorted(os.path.relpath(os.path.join(at, name), disk) for at, _, names in os.walk(disk) for name in names)
"""


def on_a_disk_of_its_own(folder: Path, options: str, script: str) -> dict:
    """Run ``script`` with a real, small file system mounted at ``folder``; return its ``facts`` and ``errors``."""
    run = [
        *("sh", "-c", f'mount -t tmpfs -o {options} none "$1" && exec "$2" -c "$3" "$1"', "sh"),
        *(str(folder), sys.executable, PRELUDE + script + "\nprint(json.dumps({**facts, **errors}))"),
    ]
    problems = []
    for namespace in (["unshare", "--user", "--map-root-user", "--mount"], ["unshare", "--mount"]):
        done = subprocess.run([*namespace, *run], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        problems.append(f"{' '.join(namespace)}: {done.stderr[-2000:]}")
    pytest.fail(
        "the small disk could not be mounted, or the script on it failed. This test needs root, or user "
        "namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone).\n"
        + "\n".join(problems)
    )


FULL = """
overwrite(store.fs, f"{disk}/progress.json", b"old")
failing("publish", lambda: publish(store.fs, f"{disk}/new/large.bin", [bytes(3 << 20)] * 3))
facts["after publish"] = files()
publish(store.fs, f"{disk}/filler", [bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize)])
failing("overwrite", lambda: overwrite(store.fs, f"{disk}/progress.json", b"x" * 5000))
failing("create_once", lambda: create_once(store.fs, f"{disk}/manifest.json", b"x" * 5000))
facts["at last"] = files()
facts["progress"] = open(f"{disk}/progress.json").read()
"""


def test_a_full_disk_is_reported_with_numbers_and_no_file_is_left(tmp_path):
    found = on_a_disk_of_its_own(tmp_path, "size=4m", FULL)
    for action in ("publish", "overwrite", "create_once"):
        number, message = found[action]
        assert number == errno.ENOSPC
        assert message.endswith(f"Free space, {GO_ON}")
    assert f"{tmp_path}/new/large.bin cannot be written: its disk or quota is full" in found["publish"][1]
    # One page of the 4 MB is used by progress.json.
    assert f"; {(9 << 20) - (4 << 20) + 4096 - (3 << 20)} more bytes are needed after" in found["publish"][1]
    assert "0 bytes and" in found["overwrite"][1]
    assert "5000 more bytes are needed after 0" in found["create_once"][1]
    assert found["after publish"] == ["progress.json"]
    assert found["at last"] == ["filler", "progress.json"]
    assert found["progress"] == "old"


NO_INODES = """
failing("create_once", lambda: [create_once(store.fs, f"{disk}/{index}", b"x") for index in range(30)])
facts["files"] = files()
"""


def test_a_disk_without_free_inodes_is_reported(tmp_path):
    found = on_a_disk_of_its_own(tmp_path, "size=4m,nr_inodes=16", NO_INODES)
    assert found["create_once"][0] == errno.ENOSPC
    assert "and 0 files are free on it" in found["create_once"][1]
    assert not [name for name in found["files"] if "tmp" in name]


READ_ONLY = """
overwrite(store.fs, f"{disk}/progress.json", b"old")
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
failing("publish", lambda: publish(store.fs, f"{disk}/new/large.bin", [b"x"]))
failing("overwrite", lambda: overwrite(store.fs, f"{disk}/progress.json", b"x"))
failing("create_once", lambda: create_once(store.fs, f"{disk}/manifest.json", b"x"))
facts["files"] = files()
"""


def test_a_read_only_disk_is_reported(tmp_path):
    found = on_a_disk_of_its_own(tmp_path, "size=4m", READ_ONLY)
    for action in ("publish", "overwrite", "create_once"):
        number, message = found[action]
        assert number == errno.EROFS
        assert "is not allowed to (Read-only file system)" in message
        assert message.endswith(
            f"Mount the disk writable, or change the owner or mode of the folder, {GO_ON}"
        )
    assert found["files"] == ["progress.json"]


LOOKING = """
import contextlib, io
from layerwise.flows.cli.store_commands import collect_garbage, verify_store
from layerwise.flows.cli.status import show_status
from layerwise.storage.signs_of_life import announced

store.get_or_build(stage, lambda draft: draft.write("weights.bin", b"w"))
overwrite(store.fs, f"{store.root}/{stage.key}/{'a' * 32}/abandoned.bin", b"x")
os.utime(f"{store.root}/{stage.key}/{'a' * 32}/abandoned.bin", (1e9, 1e9))
before = files()
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
with contextlib.redirect_stdout(io.StringIO()) as out, announced(store, "a search"):
    show_status(store.url)
    facts["codes"] = [collect_garbage(store.url, False, False), verify_store(store.url)]
    facts["artifacts"] = [each.key for each in store.artifacts()]
facts["said"] = out.getvalue()
failing("gc --apply", lambda: collect_garbage(store.url, True, False))
store = ArtifactStore(store.url)  # it has not checked yet that it can write
failing("build", lambda: store.get_or_build(Stage("other", 1), lambda draft: facts.update(worked=True)))
facts["unchanged"] = files() == before
"""


def test_a_read_only_store_can_be_read_and_a_build_fails_before_any_work(tmp_path):
    found = on_a_disk_of_its_own(tmp_path, "size=4m", LOOKING)
    assert found["codes"] == [0, 0]
    assert found["artifacts"] == [Stage("capture", 1).key]
    for said in ("No process is running", "abandoned attempts", "Nothing was deleted", "nothing is damaged"):
        assert said in found["said"]
    for action in ("gc --apply", "build"):
        number, message = found[action]
        assert number == errno.EROFS
        assert "is not allowed to (Read-only file system)" in message
    assert "worked" not in found
    assert found["unchanged"]


GOES_ON = """
def build(draft):
    if draft.resumed is None:
        draft.write("first.bin", b"1" * 1000)
        draft.save_resume_point(1, lambda state: state.write("state.bin", b"s"))
    facts.setdefault("resumed", []).append(draft.resumed is not None)
    draft.write("second.bin", bytes(3 << 20))

publish(store.fs, f"{disk}/filler", [bytes(2 << 20)])
failing("build", lambda: store.get_or_build(stage, build))
facts["found"] = store.find(stage) is not None
os.unlink(f"{disk}/filler")
artifact = store.get_or_build(stage, build)
facts["content"] = [store.read(artifact, "first.bin").decode(), len(store.read(artifact, "second.bin"))]
"""


def test_a_build_stopped_by_a_full_disk_continues_when_there_is_space(tmp_path):
    found = on_a_disk_of_its_own(tmp_path, "size=4m", GOES_ON)
    assert found["build"][0] == errno.ENOSPC
    assert "/second.bin cannot be written" in found["build"][1]
    assert found["found"] is False
    assert found["resumed"] == [False, True]
    assert found["content"] == ["1" * 1000, 3 << 20]


def test_a_folder_of_another_user_is_reported():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        us = os.geteuid()
        if us == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            for action in (publish, overwrite, create_once):
                content = [b"x"] if action is publish else b"x"
                with pytest.raises(
                    PermissionError, match=rf"{folder}/file cannot be written: .* not allowed"
                ):
                    action(LocalFileSystem(), f"{folder}/file", content)
        finally:
            os.seteuid(us)
        assert os.listdir(folder) == []


def test_an_exhausted_quota_is_reported_like_a_full_disk(tmp_path, monkeypatch):
    def write(descriptor, data):  # a real quota needs a disk of its own
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="its disk or quota is full .Disk quota exceeded.") as error:
        publish(LocalFileSystem(), f"{tmp_path}/file", [b"content"])
    assert error.value.errno == errno.EDQUOT
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_is_not_blamed_on_the_target_disk(tmp_path):
    def pieces():
        yield b"content"
        raise PermissionError(errno.EACCES, "no right to read", "/source")

    with pytest.raises(PermissionError, match="no right to read: '/source'"):
        publish(LocalFileSystem(), f"{tmp_path}/file", pieces())
    assert list(tmp_path.iterdir()) == []
