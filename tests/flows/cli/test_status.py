"""`layerwise status`: running processes, unfinished stages, finished searches."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from layerwise.flows.cli import status
from layerwise.flows.cli.status import show_status
from layerwise.storage.files.publishing import overwrite
from layerwise.storage.runs.run_log import logged
from layerwise.storage.signs_of_life import announced, doing, running_processes, storage_clock
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lanes.group_membership import note_group
from layerwise.tasks.results.search_result import RESULT_STAGE
from tests.faults import error

CAPTURE = Stage("capture", 1)
HOLDER = """
import sys, threading
from layerwise.storage.runs.run_log import logged
from layerwise.storage.signs_of_life import announced, doing
from layerwise.storage.store import ArtifactStore

store = ArtifactStore(sys.argv[1])
doing("branch: 3 betas: layer 12 of 30")
with announced(store, "search: demo at 0.5"):
    print("announced", flush=True)
    threading.Event().wait()
"""


def words(capsys) -> list[str]:
    """Return the printed lines without the spaces of the alignment, and with "AGE" in place of ages, which differ."""
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    ages = {f"{seconds} s ago" for seconds in range(60)}
    for age in sorted(ages, key=len, reverse=True):
        lines = [line.replace(age, "AGE") for line in lines]
    return [line for line in lines if line]


def shown(store: ArtifactStore, capsys) -> list[str]:
    capsys.readouterr()
    show_status(store.url)
    return words(capsys)


def leave_resume_point(store: ArtifactStore, stage: Stage = CAPTURE, step: int = 12) -> None:
    store.draft(stage).save_resume_point(step, lambda state: state.write("state.bin", bytes(2000)))


def finish_search(store: ArtifactStore, source: str) -> str:
    settings = {"sparsity": 0.5, "pruner": {"method": "wanda"}}
    stage = Stage(RESULT_STAGE, 1, {"settings": settings, "source": source})

    def build(draft):
        draft.facts |= {"verdict": f"beta 0.1 of {source} is best [red]", "source": source}

    store.get_or_build(stage, build)
    return stage.key


def make_old(store: ArtifactStore, key: str, seconds: float) -> None:
    then = storage_clock(store) - seconds
    for path in Path(store.root, key).iterdir():
        os.utime(path, (then, then))


def test_a_store_without_processes_stages_or_searches_says_so(store, capsys):
    store.get_or_build(CAPTURE, lambda draft: None)
    assert shown(store, capsys) == [
        "No process is running.",
        "No stage is unfinished.",
        "No search has finished.",
    ]


def test_a_running_process_is_listed_with_its_flow_and_stage(store, capsys):
    doing("capture: dense model: layer 3 of 30", 7260.0)
    try:
        with announced(store, "search: demo [red] at 0.5"):
            lines = shown(store, capsys)
    finally:
        doing("")
    assert lines[:3] == [
        "Running: 1 process",
        "host process started last sign left flow doing",
        f"{socket.gethostname()} {os.getpid()} AGE AGE 2 h search: demo [red] at 0.5 capture: dense model: layer 3 of 30",
    ]


def test_a_resume_point_younger_than_a_running_process_is_in_progress(store, capsys):
    with announced(store, "a search"):
        leave_resume_point(store)
        lines = shown(store, capsys)
    row = lines.index("stage saved host step work so far size") + 1
    key = CAPTURE.key[: len("capture/") + 8]
    assert lines[row] == f"{key} AGE {socket.gethostname()} 12 0 s 2 kB in progress"
    assert lines[row + 1] == "No search has finished."


def test_a_resume_point_without_a_running_process_is_interrupted(store, capsys):
    leave_resume_point(store)
    lines = shown(store, capsys)
    assert lines[0] == "No process is running."
    assert "2 kB interrupted" in lines[3]
    assert lines[4] == "No process works on these. Start the same search again to resume."


def test_a_resume_point_older_than_all_running_processes_is_interrupted(tmp_path, capsys):
    store = ArtifactStore(str(tmp_path / "store"))
    leave_resume_point(store)
    make_old(store, CAPTURE.key, 2 * 3600)
    with announced(store, "a search"):
        leave_resume_point(store, Stage("export", 1), 3)
        lines = shown(store, capsys)
    new, old, advice = lines[5:8]
    assert new.endswith("3 0 s 2 kB in progress")
    assert "2 h ago" in old
    assert old.endswith("12 0 s 2 kB interrupted")
    assert advice.startswith("1 interrupted: saved before any running process started.")


def test_a_finished_stage_is_not_unfinished(store, capsys):
    leave_resume_point(store)
    progress = store.fs.cat_file(f"{store.root}/{CAPTURE.key}/progress.json")
    store.get_or_build(CAPTURE, lambda draft: None)
    overwrite(store.fs, f"{store.root}/{CAPTURE.key}/progress.json", progress)  # by a second builder
    assert "No stage is unfinished." in shown(store, capsys)


def test_lanes_that_only_note_their_group_are_not_listed(store, capsys):
    note_group(store, [Stage("lane", 1, beta) for beta in (0.1, 0.2)])
    assert "No stage is unfinished." in shown(store, capsys)


def test_a_damaged_resume_point_is_listed_as_damaged(store, capsys):
    leave_resume_point(store)
    overwrite(store.fs, f"{store.root}/{CAPTURE.key}/progress.json", b"{")
    assert "damaged: the stage will start from its beginning" in shown(store, capsys)[3]


def test_a_finished_search_is_listed_with_source_sparsity_and_verdict(store, capsys):
    key = finish_search(store, "owner/model")
    assert shown(store, capsys)[2:] == [
        "Finished searches",
        f"AGE: owner/model at sparsity 0.5, wanda ({key[: len('search/') + 8]})",
        "beta 0.1 of owner/model is best [red]",
        f"`layerwise show {store.url} KEY` shows a search.",
    ]


def test_only_the_newest_five_of_many_finished_searches_are_listed(tmp_path, capsys):
    store = ArtifactStore(str(tmp_path / "store"))
    for days in range(1, 8):
        make_old(store, finish_search(store, f"model-{days}"), days * 86400 + 60)
    lines = shown(store, capsys)
    assert lines[2] == "Finished searches, the newest 5 of 7"
    assert [line.partition(" at ")[0] for line in lines[3:13:2]] == [
        "24 h ago: model-1",
        "2 days ago: model-2",
        "3 days ago: model-3",
        "4 days ago: model-4",
        "5 days ago: model-5",
    ]


def test_a_damaged_search_does_not_hide_the_others(store, capsys):
    finish_search(store, "owner/model")
    damaged = finish_search(store, "owner/other")
    overwrite(store.fs, f"{store.root}/{damaged}/manifest.json", b"{")
    lines = shown(store, capsys)
    assert "AGE: damaged (" in "\n".join(lines)
    assert "beta 0.1 of owner/model is best [red]" in lines


def test_a_real_search_is_listed(run_search, tmp_path, capsys):
    store = ArtifactStore(str(tmp_path / "store"))
    result = run_search(store.url)
    capsys.readouterr()
    lines = shown(store, capsys)
    assert result.selection.verdict in " ".join(lines)
    assert any(f"{result.source} at sparsity 0.5, wanda" in line for line in lines)
    assert status.SEARCH == RESULT_STAGE


def test_a_killed_process_is_listed_as_running_and_later_as_silent(
    tmp_path, pytestconfig, capsys, monkeypatch
):
    store = ArtifactStore(str(tmp_path / "store"))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.url],
        cwd=pytestconfig.rootpath,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "announced\n"
    about = "search: demo at 0.5 branch: 3 betas: layer 12 of 30"
    assert shown(store, capsys)[2] == f"{socket.gethostname()} {process.pid} AGE AGE {about}"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [sign] = Path(store.root, "running").iterdir()
    long_ago = storage_clock(store) - 3 * 3600
    os.utime(sign, (long_ago, long_ago))
    assert running_processes(store, storage_clock(store)) == []
    assert shown(store, capsys)[:5] == [
        "No process is running.",
        "No sign of life: killed, or cut off from the store",
        "host process last sign flow was doing",
        f"{socket.gethostname()} {process.pid} 3 h ago {about}",
        "Their resume points are below. `layerwise gc` removes these entries after an hour.",
    ]


def test_read_access_is_enough(fault_proxy, s3_bucket, capsys):
    store = ArtifactStore(f"s3://{s3_bucket}/read-only")
    finish_search(store, "owner/model")
    fault_proxy.inject(error(403), lambda request: request.writes, times=float("inf"))
    assert "Finished searches" in shown(store, capsys)


def test_an_interrupted_search_is_listed_with_the_command_that_resumes_it(store, capsys):
    about = {"state": "running", "folder": "/data/my runs", "command": "layerwise search --model='a b'"}
    for number, (name, more) in enumerate(
        {
            "search: killed": {},
            "search: failed": {"state": "failed", "error": "ValueError: no\nroom"},
            "search: resumed and finished": {},
            "search: at work": {},
            "zero-shot": {"search": "", "command": ""},
        }.items()
    ):
        with logged(store, f"{number:032x}", {**about, "title": name, "search": name, **more}):
            pass
    with logged(
        store, "a" * 32, {**about, "title": "again", "search": "search: resumed and finished"}
    ) as log:
        log.describe(state="finished")
    with announced(store, "search: at work", f"{3:032x}"):
        lines = shown(store, capsys)
    first = lines.index("Interrupted searches and comparisons, and the commands that resume them") + 1
    shown_searches = {lines[row]: lines[row + 1 : row + 3] for row in (first, first + 3)}
    resume = "cd '/data/my runs' && layerwise search --model='a b'"
    assert shown_searches == {
        "AGE: search: failed: ValueError: no room": [f"log: {store.root}/logs/{1:032x}.jsonl", resume],
        "AGE: search: killed: killed, or cut off from the store": [
            f"log: {store.root}/logs/{0:032x}.jsonl",
            resume,
        ],
    }
    assert lines[first + 6] == "No search has finished."


def test_a_path_without_a_store_is_refused_and_not_created(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="is not a store: nothing is there. Check the path or URL."):
        show_status(str(missing))
    assert not missing.exists()
