"""Logs of runs in the store: bounded, rewritten as a whole, without secrets, and collected with their search."""

import json
import logging

import pytest

from layerwise.storage.inventory import take_inventory
from layerwise.storage.runs import run_log
from layerwise.storage.runs.run_log import logged
from layerwise.storage.runs.run_record import read_records
from layerwise.storage.signs_of_life import storage_clock
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import LOGS, collect, plan_collection
from tests.faults import error

ABOUT = {"title": "search: demo at 0.5", "state": "running", "search": "ab", "command": "layerwise search"}
DAY = 86400


def lines_of(store, name: str) -> list[dict]:
    return list(map(json.loads, store.fs.cat_file(store.path(f"logs/{name}.jsonl")).decode().splitlines()))


def test_a_log_has_a_description_and_its_lines_without_secrets(store):
    with logged(store, "a" * 32, ABOUT) as log:
        log.add({"message": "s3://id:secret@host/x failed", "layer": 3})
        log.add({"message": " " * (run_log.LONGEST_LINE - 15) + "s3://id:secret@host/x"})
        log.describe(state="finished", result="search/1")
    about, line, cut = lines_of(store, "a" * 32)
    assert "secret" not in cut["message"]
    assert line == {"message": "s3://***@host/x failed", "layer": 3}
    assert about.items() > {**ABOUT, "state": "finished"}.items()
    (record,) = read_records(store, take_inventory(store).logs)
    assert (record.name, record.title, record.state) == ("a" * 32, ABOUT["title"], "finished")
    assert (record.result, record.command) == ("search/1", "layerwise search")
    assert take_inventory(store).not_ours == []


def test_a_long_log_keeps_its_description_and_its_newest_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "MOST_BYTES", 1000)
    store = ArtifactStore(str(tmp_path / "store"))
    with logged(store, "b" * 32, ABOUT) as log:
        for number in range(100):
            log.add({"number": number, "text": "x" * 70})
    about, *lines = lines_of(store, "b" * 32)
    kept = [line["number"] for line in lines]
    assert kept == list(range(100 - len(kept), 100))
    assert about["lines_dropped"] == 100 - len(kept)
    assert 5 <= len(kept) <= 1000 // 90


def test_a_store_that_refuses_the_log_does_not_end_the_run(fault_proxy, s3_bucket, caplog):
    store = ArtifactStore(f"s3://{s3_bucket}/unwritable")
    fault_proxy.inject(error(403), lambda request: request.writes, times=float("inf"))
    caplog.set_level(logging.INFO, logger="layerwise.storage")
    with logged(store, "c" * 32, ABOUT) as log:
        log.add({"message": "layer 1"})
    assert "no log of this run" in caplog.text or "continues without it" in caplog.text


@pytest.mark.parametrize("results_only", [False, True])
def test_a_log_is_collected_with_its_artifact_or_after_a_month(tmp_path, results_only):
    store = ArtifactStore(str(tmp_path / "store"))
    search = store.get_or_build(Stage("search", 1), lambda draft: None)
    other = store.get_or_build(Stage("compress", 1), lambda draft: None)
    logs = {"1" * 32: search.key, "2" * 32: other.key, "3" * 32: "search/" + "0" * 32, "4" * 32: ""}
    for name, result in logs.items():
        with logged(store, name, {**ABOUT, "result": result}):
            pass

    def collected(days: float) -> set[str]:
        keep = (lambda artifacts: {search.key}) if results_only else None
        found = plan_collection(store, keep, now=storage_clock(store) + days * DAY).garbage
        return {each.path[5:6] for each in found if each.kind == LOGS}

    assert collected(0) == set()  # younger than the grace period
    assert collected(1) == ({"2", "3"} if results_only else {"3"})
    assert collected(31) == ({"2", "3", "4"} if results_only else {"3", "4"})
    if not results_only:
        collect(store, plan_collection(store, now=storage_clock(store) + 31 * DAY))
        assert {entry.path[5:6] for entry in take_inventory(store).logs} == {"1", "2"}
