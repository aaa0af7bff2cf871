"""Join rounds: a lane that ran on its windows in parts is the lane that ran on all of them."""

from dataclasses import replace

import pytest

from layerwise.storage.tables import read_table
from layerwise.tasks.branch import branch
from layerwise.tasks.lanes.join_rounds import join_rounds
from layerwise.tasks.running.execution import Execution


def in_rounds(run, beta, *parts):
    """The lane of ``beta``, run on one part of the windows after the other."""
    inputs = [replace(run.inputs(), windows=part) for part in parts]
    plans = run.plans([beta])
    return [branch.fn(run.store, each, plans, run.linears, run.pruning, Execution())[0] for each in inputs]


@pytest.mark.parametrize("mode", ["dense", "sequential"])
def test_joined_parts_have_the_losses_errors_and_zeros_of_the_whole(small_run, mode):
    run = small_run(calibration_mode=mode)
    (whole,) = run.branch(0.2)
    rounds = in_rounds(run, 0.2, (0, 2), (2, 3))
    assert [len(part.losses) for part in rounds] == [2, 1]
    (joined,) = join_rounds.fn(run.store, [rounds])
    assert joined.losses == pytest.approx(whole.losses, rel=1e-6)
    assert joined.realised_sparsity == whole.realised_sparsity
    assert set(joined.artifact.files) == set(whole.artifact.files)
    for name in whole.artifact.files:
        expected, table = (read_table(run.store, lane.artifact, name) for lane in (whole, joined))
        assert table.schema == expected.schema
        for column in table.column_names:
            values, wanted = table[column].to_pylist(), expected[column].to_pylist()
            assert values == (wanted if column == "linear" else pytest.approx(wanted, rel=1e-5))


def test_lanes_are_joined_once(small_run):
    run = small_run()
    rounds = in_rounds(run, 0.2, (0, 1), (1, 3))
    (joined,) = join_rounds.fn(run.store, [rounds])
    before = run.files()
    assert join_rounds.fn(run.store, [rounds]) == [joined]
    assert run.files() == before


def test_a_joined_lane_can_be_exported(small_run):
    run = small_run(calibration_mode="sequential")
    (whole,) = run.branch(0.2)
    (joined,) = join_rounds.fn(run.store, [in_rounds(run, 0.2, (0, 2), (2, 3))])
    assert run.losses(run.exported_model(joined), "selection") == pytest.approx(whole.losses, rel=1e-5)
