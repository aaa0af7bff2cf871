"""Stage tasks: retries after an outage of the storage only, and names of runs."""

import re

import pytest
from prefect import flow
from prefect.context import TaskRunContext

from layerwise.storage.files.errors import Corrupt, Unreachable
from layerwise.tasks.running.stage_task import stage_task


@pytest.fixture
def outcomes(prefect_backend):
    """Run a stage whose calls have the given outcomes; return its result and the unused outcomes."""

    def run(*outcomes: object) -> tuple[object, list[object]]:
        left = list(outcomes)

        @stage_task()
        def stage() -> object:
            outcome = left.pop(0)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        @flow(persist_result=False)
        def whole() -> object:
            return stage.with_options(retry_delay_seconds=0)()

        try:
            return whole(), left
        except Exception as error:
            return error, left

    return run


def test_a_stage_is_called_again_after_an_outage_of_the_storage(outcomes):
    away = Unreachable("bucket/key at http://s3 cannot be reached")
    assert outcomes(away, away, away, "done") == ("done", [])


def test_it_gives_up_after_three_more_calls(outcomes):
    away = Unreachable("bucket/key at http://s3 cannot be reached")
    error, left = outcomes(away, away, away, away, "not called")
    assert isinstance(error, Unreachable)
    assert left == ["not called"]


@pytest.mark.parametrize("error", [Corrupt("damaged"), ValueError("bad input"), PermissionError("refused")])
def test_other_errors_end_a_stage_at_once(outcomes, error):
    raised, left = outcomes(error, "not called")
    assert type(raised) is type(error)
    assert left == ["not called"]


@pytest.fixture
def run_name(prefect_backend):
    """Run a stage with the argument ``beta``, and return the name of the run."""

    def run(**options) -> str:
        @stage_task(**options)
        def prune(beta: float) -> str:
            return TaskRunContext.get().task_run.name

        @flow(persist_result=False)
        def whole() -> str:
            return prune(0.25)

        return whole()

    return run


def test_a_run_is_named_after_its_task_and_description(run_name):
    assert run_name(about=lambda beta: f"with beta {beta}") == "prune with beta 0.25"
    assert run_name(name="lane", about=lambda beta: f"with beta {beta}") == "lane with beta 0.25"
    assert re.fullmatch(r"prune-\w+", run_name())


def test_a_description_that_does_not_accept_the_arguments_is_refused_at_definition():
    with pytest.raises(TypeError, match="'end'"):

        @stage_task(about=lambda store: "words")
        def stage(store: object, end: float) -> None: ...


@pytest.mark.parametrize("about", [lambda beta: beta.missing, lambda beta: 1 / 0])
def test_a_description_that_fails_does_not_fail_the_run(run_name, about):
    assert run_name(about=about) == "prune"
