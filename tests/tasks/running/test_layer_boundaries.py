"""Resume points at layer boundaries: when they are due."""

import pytest

from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.tasks.running import layer_boundaries
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.stopping import Stopped, stopping_on_sigterm
from tests.tasks.running.test_stopping import terminate


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(layer_boundaries, "time", clock)
    return clock


def committed_layers(store, clock, execution, layer_seconds, commit_seconds, layers=100, stop_at=None):
    """Return the layers after which a resume point was committed."""
    draft, committed = Draft(store, Stage("capture", 1)), []
    reached_layer = 0

    def write_state(state):
        clock.now += commit_seconds
        committed.append(reached_layer)

    try:
        with stopping_on_sigterm(), boundaries(draft, execution, write_state) as reached:
            for reached_layer in range(1, layers + 1):
                clock.now += layer_seconds
                if reached_layer == stop_at:
                    terminate()
                reached(reached_layer)
    except Stopped:
        assert stop_at
    return committed


def test_quick_resume_points_are_committed_at_their_interval(local_store, clock):
    execution = Execution(boundary_seconds=300)
    assert committed_layers(local_store, clock, execution, 100, 1, layers=10) == [3, 6, 9]


def test_a_slow_resume_point_delays_the_next_one_by_20_times_its_duration(local_store, clock):
    execution = Execution(boundary_seconds=300)
    assert committed_layers(local_store, clock, execution, 100, 40, layers=25) == [3, 11, 19]


def test_resume_points_by_number_of_layers_are_exact_however_slow_they_are(local_store, clock):
    execution = Execution(boundary_seconds=300, boundary_layers=2)
    assert committed_layers(local_store, clock, execution, 1, 1000, layers=7) == [2, 4, 6]


def test_a_stop_signal_commits_although_the_last_resume_point_was_slow(local_store, clock):
    execution = Execution(boundary_seconds=300)
    assert committed_layers(local_store, clock, execution, 100, 1000, layers=20, stop_at=7) == [3, 7]
