"""A stage outlives an outage of the storage; whatever will not pass ends it at once."""

import pytest
from prefect import flow

from storage.corrupt import Corrupt
from storage.unreachable import Unreachable
from tasks.stage_task import stage_task


@pytest.fixture
def outcomes(prefect_backend):
    """Run a stage whose calls end one after the other as they are told; returns its result and the calls left."""

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


def test_a_stage_is_called_again_when_the_storage_could_not_be_reached(outcomes):
    away = Unreachable("bucket/key at http://s3 cannot be reached")
    assert outcomes(away, away, away, "done") == ("done", [])


def test_it_gives_up_after_three_more_calls(outcomes):
    away = Unreachable("bucket/key at http://s3 cannot be reached")
    error, left = outcomes(away, away, away, away, "not called")
    assert isinstance(error, Unreachable)
    assert left == ["not called"]


@pytest.mark.parametrize("error", [Corrupt("damaged"), ValueError("bad input"), PermissionError("refused")])
def test_what_will_not_pass_ends_it_at_once(outcomes, error):
    raised, left = outcomes(error, "not called")
    assert type(raised) is type(error)
    assert left == ["not called"]
