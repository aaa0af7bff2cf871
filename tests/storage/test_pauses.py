"""Pauses: a process that was stopped while others deleted its files rebuilds them and explains why."""

import os
import signal
import subprocess
import sys
import time

import pytest

from layerwise.storage.files.errors import Corrupt
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from tests.leftovers import STAGE, collect_all, paths_in

SLEEPER = """
import logging, sys
import layerwise.storage.pauses, layerwise.storage.signs_of_life
from layerwise.storage.signs_of_life import announced
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore

logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
layerwise.storage.pauses.SHORTEST, layerwise.storage.signs_of_life.EVERY = 0.5, 0.1
store, resume_point, place = ArtifactStore(sys.argv[1]), sys.argv[2], sys.argv[3]

def paused(at):
    if at == place and not waited:
        waited.append(at)
        print("paused", flush=True)
        assert sys.stdin.readline()

def pieces():
    yield b"o" * 500
    paused("in a file")
    yield b"o" * 500

def build(draft):
    built.append(draft.resumed.step if draft.resumed else 0)
    if draft.resumed is None:
        draft.write("inherited.bin", b"i" * 1000)
        if resume_point == "yes":
            draft.save_resume_point(1, lambda state: state.write("state.bin", b"s" * 1000))
    draft.write("first.bin", b"f" * 1000)
    draft.write("own.bin", pieces())
    paused("before a resume point")
    draft.save_resume_point(2, lambda state: state.write("state.bin", b"s" * 1000))
    paused("after a resume point")
    draft.write("last.bin", b"l" * 1000)
    paused("before the commit")

waited, built = [], []
with announced(store, "a search"):
    store.get_or_build(Stage("capture", 1), build)
    print("built from", built, flush=True)
"""


@pytest.mark.parametrize(
    ("kind", "resume_point", "place", "built_from"),
    [
        ("local", "no", "before a resume point", [0, 0]),
        ("local", "yes", "in a file", [0, 1]),
        ("local", "yes", "before a resume point", [0, 1]),
        ("local", "yes", "after a resume point", [0]),
        ("s3", "no", "before the commit", [0, 2]),
    ],
)
def test_files_deleted_while_a_process_was_stopped_are_rebuilt(
    request, tmp_path, pytestconfig, kind, resume_point, place, built_from
):
    bucket = request.getfixturevalue("s3_bucket") if kind == "s3" else ""
    store = ArtifactStore(f"s3://{bucket}/{tmp_path.name}" if bucket else str(tmp_path / "store"))
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, store.url, resume_point, place],
        **{"cwd": pytestconfig.rootpath, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},
    )
    try:
        assert process.stdout.readline() == "paused\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.2)
        collect_all(store)  # a day later, by the storage's clock
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate("go on\n", timeout=100)
    finally:
        process.kill()
        process.wait()
    *warnings, last = out.splitlines()
    assert last == f"built from {built_from}"
    if built_from == [0]:
        assert warnings == []
    else:
        assert len(warnings) == 1, warnings
        warning = warnings[0]
        assert warning.startswith(STAGE.key)
        assert (
            "was deleted while the artifact was being built. Likely reason: this process was paused for"
            in warning
        )
    artifact = store.get(STAGE.key)
    content = {name: store.read(artifact, name) for name in artifact.files}
    names = ("inherited", "first", "own", "last")
    assert content == {f"{name}.bin": name[0].encode() * 1000 for name in names}
    collect_all(store)
    in_use = {file.path for file in artifact.files.values()} | {f"{STAGE.key}/manifest.json"}
    assert paths_in(store) == in_use


def test_a_large_file_whose_upload_is_aborted_is_written_again(store):
    aborted = []

    def pieces():
        yield bytes(20 << 20)
        if not aborted:
            aborted.append(collect_all(store))
        yield bytes(20 << 20)

    artifact = store.get_or_build(Stage("capture", 1), lambda draft: draft.write("large.bin", pieces()))
    assert store.read(artifact, "large.bin") == bytes(40 << 20)


def test_a_build_whose_files_are_repeatedly_deleted_fails_without_blaming_a_pause(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))

    def build(draft):
        os.unlink(f"{store.root}/{draft.write('weights.bin', b'w').path}")

    with pytest.raises(
        Corrupt,
        match=r"were deleted 4 times, the last time .*weights.bin. Stop the program that deletes files",
    ):
        store.get_or_build(STAGE, build)
    assert store.find(STAGE) is None
