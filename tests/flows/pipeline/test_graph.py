"""Graph of a search: one description of its stages, for building them and for looking them up."""

import pytest

from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.graph import LaneStep, Step, run
from layerwise.flows.pipeline.lookup import look_up
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.running.execution import Execution

FIRST, SECOND = Stage("first", 1), Stage("second", 1)


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def two_steps(store, first=FIRST, second=SECOND):
    """Yield a graph of two stages; the second one is known only from the artifact of the first."""

    def made(stage, role):
        return lambda execution: [store.get_or_build(stage, lambda draft: draft.write(role, b"here"))]

    (artifact,) = yield Step(name="first", stages=[("one", first)], build=made(FIRST, "one"))
    stage = None if artifact is None else second
    (end,) = yield Step(name="second", stages=[("two", stage)], build=made(SECOND, "two"))
    return end


def find(store):
    return lambda step: [None if stage is None else store.find(stage) for _, stage in step.stages]


def test_a_graph_is_looked_up_and_built_from_one_description(store):
    assert run(two_steps(store), find(store)) is None
    end, artifacts = build(two_steps(store), Execution())
    assert {role: artifact.key for role, artifact in artifacts.items()} == {
        "one": FIRST.key,
        "two": SECOND.key,
    }
    assert run(two_steps(store), find(store)) == end == artifacts["two"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"second": Stage("second", 2)}, "a look-up for second/"), ({"second": None}, "two is built after")],
)
def test_a_step_that_builds_another_artifact_than_it_looks_up_is_an_error(store, changes, problem):
    with pytest.raises(AssertionError, match=problem):
        build(two_steps(store, **changes), Execution())


def test_the_end_of_an_iteration_inside_a_step_is_not_the_end_of_the_graph(store):
    def steps():
        yield Step(name="first", stages=[("one", FIRST)], build=lambda execution: [next(iter([]))])

    with pytest.raises(StopIteration):
        build(steps(), Execution())


def test_in_an_empty_store_only_stages_that_need_no_artifact_are_known(workshop, store):
    found = look_up(store, workshop.settings())
    known = {role for each in found.steps for role, stage in each.step.stages if stage is not None}
    assert known == {"checkpoint", "calibration", "selection", "test", "allocate"}
    assert set(found.missing) == {
        *known,
        "capture",
        *(f"lane beta {beta}" for beta in ("0", "0.1", "0.25")),
        *("select", "export", "evaluate"),
    }
    assert not found.next_lanes.are_known


def test_the_look_up_of_a_finished_search_finds_the_artifacts_of_its_result(workshop, finished):
    result, runtime = finished
    found = look_up(ArtifactStore(runtime.store), workshop.settings())
    stages = {role: artifact and artifact.key for role, artifact in found.stages.items()}
    assert stages == {role: artifact.key for role, artifact in result.stages.items()}
    assert found.missing == found.next_lanes.missing == []
    assert [each.step.name for each in found.steps if isinstance(each.step, LaneStep)] == ["branch"]
