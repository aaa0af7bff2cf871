"""Time left of a search: the measured rate of the current stage, and corrected estimates of the later ones."""

import pytest

from layerwise.compute_rates import ComputeRates
from layerwise.flows.observers import search_clock
from layerwise.flows.observers.search_clock import SearchClock
from layerwise.flows.pipeline.lookup import look_up
from layerwise.flows.pipeline.size_estimate import SearchSizes
from layerwise.flows.pipeline.time_estimate import SearchTimes
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.models.transfer_rates import TransferRates
from layerwise.tasks.running.progress import RunTime

# Only the forward pass takes time: a second for every window in each of the three layers. The import is not estimated.
FORWARD = ComputeRates(layer=1, statistics=0, grams=0, load=0, preparing=0, pruning=0, head=0)
AT_ONCE = TransferRates(read=None, imported=None, written=None, notes=())


def test_later_stages_take_their_estimate_times_the_ratio_of_the_stages_so_far(
    workshop, tmp_path, monkeypatch
):
    settings = workshop.settings()  # three plans; six calibration, four selection and three test windows
    found = look_up(ArtifactStore(str(tmp_path / "store")), settings)
    windows = {"calibration": 6, "selection": 4, "test": 3}
    sizes = SearchSizes(settings, found.inputs.index, found.inputs.linears, "float32", 3, windows)
    now = [100.0]
    monkeypatch.setattr(search_clock.time, "monotonic", lambda: now[0])
    clock = SearchClock(settings, found, SearchTimes(sizes, FORWARD, AT_ONCE))
    steps = {each.step.name: each.step for each in found.steps}
    capture, lanes, evaluation = 3 * (6 + 4), 3 * 3 * 4, 3 * (3 + 2 * (3 + 3))

    clock.began(steps["import_checkpoint"])
    assert clock(None) == RunTime(capture + lanes + evaluation, at_least=True)
    assert clock(10.0) == RunTime(10 + capture + lanes + evaluation)
    clock.ended(steps["import_checkpoint"], [], 5.0)

    clock.began(steps["capture"])
    now[0] += 20
    assert clock(40.0) == RunTime(40 + 2 * (lanes + evaluation))  # 60 s in all, twice the estimate
    clock.ended(steps["capture"], [], 60.0)

    clock.began(steps["branch"])
    assert clock(None) == RunTime(2 * (lanes + evaluation))
    now[0] += 24
    ratio = (60 + 24 + 12) / (capture + lanes)
    assert clock(12.0).seconds == pytest.approx(12 + ratio * evaluation)
    clock.ended(steps["branch"], [], 36.0)

    clock.began(steps["select"])
    clock.ended(steps["select"], [], 0.1)
    clock.began(steps["export"])  # with the test, in the same pass
    assert clock(7.0) == RunTime(7.0)
