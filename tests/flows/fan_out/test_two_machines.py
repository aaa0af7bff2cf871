"""Two machines that run the same search in the same bucket do not disturb each other."""

import random
import uuid

import pytest

from layerwise.storage.store import ArtifactStore
from layerwise.tasks.report import REPORT_STAGE
from tests.attempts import Attempt
from tests.small_search import small_search
from tests.work_log import mark_of

LAYERS = 6


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, object]:
    return small_search(tmp_path_factory.mktemp("small"), LAYERS)


@pytest.fixture(scope="module")
def machines(settings, s3_bucket, prefect_backend, tmp_path_factory):
    """Return a function that starts the search on several machines at once, in the same bucket."""

    def begin(bucket: str, count: int) -> list[Attempt]:
        folder = tmp_path_factory.mktemp("machines")
        attempts = [Attempt(folder / str(number), prefect_backend) for number in range(count)]
        for attempt in attempts:
            attempt.prepare()
        for attempt in attempts:
            attempt.begin(settings, {"store": f"s3://{s3_bucket}/{bucket}", "boundary_layers": 1})
        return attempts

    return begin


@pytest.fixture(scope="module")
def contents(s3_bucket):
    """Return a function for the digests of all artifacts by key, without reports, which contain times."""

    def read(bucket: str) -> dict[str, str]:
        store = ArtifactStore(f"s3://{s3_bucket}/{bucket}")
        artifacts = [each for each in store.artifacts() if each.recipe["name"] != REPORT_STAGE]
        return {artifact.key: artifact.content for artifact in artifacts}

    return read


@pytest.fixture(scope="module")
def undisturbed(machines, contents) -> dict[str, str]:
    bucket = uuid.uuid4().hex
    (alone,) = machines(bucket, 1)
    alone.result()
    return contents(bucket)


def errors_of(attempt: Attempt) -> list[str]:
    return [line for _, line in attempt.lines if line.startswith(("ERROR", "CRITICAL"))]


@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_one_of_two_machines_does_not_disturb_the_other(machines, contents, undisturbed, killed):
    bucket, chance = uuid.uuid4().hex, random.Random(killed)
    both = machines(bucket, 2)
    # Any of several layers: the later machine skips layers when it continues from the other's resume point.
    marks = {f"branch, layer {layer}" for layer in range(chance.randrange(2, LAYERS - 1), LAYERS)}
    assert both[killed].wait_for(lambda line: mark_of(line) in {*marks, "branch"})
    assert both[killed].run_for(chance.uniform(0, 0.1))
    assert both[killed].kill()
    survivor = both[1 - killed]
    result = survivor.result()
    assert errors_of(survivor) == []
    assert contents(bucket) == undisturbed
    (third,) = machines(bucket, 1)
    assert third.result() == {**result, "built": []}


def test_two_machines_that_run_at_the_same_time_end_with_the_same_result(machines, contents, undisturbed):
    bucket = uuid.uuid4().hex
    both = machines(bucket, 2)
    one, other = (attempt.result() for attempt in both)
    assert {**one, "built": []} == {**other, "built": []}
    assert [errors_of(attempt) for attempt in both] == [[], []]
    assert contents(bucket) == undisturbed
