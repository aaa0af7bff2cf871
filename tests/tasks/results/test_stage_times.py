"""Times of stages, for artifacts whose times can be checked by eye."""

import pytest

from layerwise.storage.artifact import Artifact
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lanes.group_membership import GROUP
from layerwise.tasks.results.evaluation import TestResult
from layerwise.tasks.results.search_result import FinishedSearch
from layerwise.tasks.results.selection import ScoreRow, Selection
from layerwise.tasks.results.stage_times import stages_table


def made(name, at, seconds, inputs=None, **more) -> Artifact:
    """Return an artifact that was committed at this time of day, after this many seconds of work."""
    recipe = {"name": name.partition("/")[0], "inputs": inputs or {}}
    how = {"at": f"2026-01-02T{at}+00:00", "seconds": seconds, **more}
    return Artifact(name, {}, recipe=recipe, made=how)


def search_of(stages) -> FinishedSearch:
    selection = Selection((ScoreRow(0.0, 1.0, 2.7, None, 0.5, 1),), 0, None, 2.0)
    return FinishedSearch(
        Artifact("search/0", {}), {}, "demo", selection, TestResult(1, 2.0, 2.0, 2.0, None), stages
    )


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def test_a_pause_between_two_stages_is_removed(store):
    stages = {"capture": made("capture/0", "10:00:10", 10.0), "evaluate": made("evaluate/0", "23:00:05", 5.0)}
    capture, evaluate = stages_table(store, search_of(stages))
    assert (capture["start"], capture["end"]) == (0.0, 10.0)
    assert (evaluate["start"], evaluate["end"]) == (10.0, 15.0)


def test_parallel_stages_keep_their_relative_times(store):
    stages = {"one": made("lane/1", "10:00:10", 10.0), "two": made("lane/2", "10:00:12", 8.0)}
    rows = stages_table(store, search_of(stages))
    assert [(row["start"], row["end"]) for row in rows] == [(0.0, 10.0), (4.0, 12.0)]


def test_lanes_appear_as_the_lane_group_that_they_ran_in(store):
    def lane(number):
        stage = Stage("lane", 1, number)
        return store.get_or_build(stage, lambda draft: draft.made.update({GROUP: group.key}))

    lanes = {f"lane {number}": Stage("lane", 1, number).key for number in (0, 1)}
    group = store.get_or_build(
        Stage("lane_group", 1, None, lanes), lambda draft: draft.facts.update({"weights read, bytes": 7})
    )
    rounds = Stage("lane_rounds", 1, None, {"round 0": lane(0).key})
    stages = {"lane beta 0": store.get_or_build(rounds, lambda draft: None), "lane beta 1": lane(1)}
    (row,) = stages_table(store, search_of(stages))
    assert (row["stage"], row["key"], row["weights_read"]) == ("2 lanes", group.key, 7)
    assert row["peak_memory"] == group.made["peak_memory"]


def test_the_memory_of_an_artifact_without_a_record_is_none(store):
    (row,) = stages_table(store, search_of({"capture": made("capture/0", "10:00:10", 10.0)}))
    assert row["peak_memory"] is None
