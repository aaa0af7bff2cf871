"""Several evaluations in one group: the artifacts are those of each alone."""

import pytest

from layerwise.storage.tables import read_table
from layerwise.tasks.branch import ERRORS_FILE
from layerwise.tasks.evaluate import read_test
from layerwise.tasks.lanes.evaluate_group import evaluate_together
from layerwise.tasks.running.execution import Execution


def together(run, *betas: float) -> None:
    uniform, *bests = run.plans((0.0, *betas))
    evaluate_together.fn(run.store, run.inputs("test"), uniform, bests, run.linears, run.pruning, Execution())


@pytest.mark.parametrize("mode", ["dense", "sequential"])  # the latter is left to ``evaluate``
def test_each_is_what_it_would_be_alone(small_run, another_store, mode):
    run = small_run(calibration_mode=mode)
    alone = small_run(run.folder, another_store(), calibration_mode=mode)
    together(run, 0.0, 0.25, 0.1)
    for best in (0.0, 0.25, 0.1):
        of_group, single = run.evaluate(0.0, best), alone.evaluate(0.0, best)
        assert of_group.content == single.content
        assert read_test(run.store, of_group) == read_test(alone.store, single)
        assert of_group.facts["best"] == single.facts["best"]


def test_the_model_is_read_once_for_all_of_them(small_run, computed_layers):
    run = small_run()
    run.capture()
    computed_layers.clear()
    together(run, 0.0, 0.25, 0.1)
    assert computed_layers == [0, 1, 2]
    run.evaluate(0.0, 0.1)
    together(run, 0.0, 0.25, 0.1)
    assert computed_layers == [0, 1, 2]


def test_a_single_one_is_left_to_whoever_needs_it(small_run, computed_layers):
    run = small_run()
    run.evaluate(0.0, 0.25)
    before = run.files()
    together(run, 0.25, 0.1)
    assert run.files() == before


def test_the_errors_of_pruned_layers_are_taken_apart(small_run):
    run = small_run()
    evaluation = run.evaluate(0.0, 0.25)
    assert f"dense/{ERRORS_FILE}" not in evaluation.files
    for lane in ("uniform", "best"):
        rows = read_table(run.store, evaluation, f"{lane}/{ERRORS_FILE}").to_pylist()
        assert [row["layer"] for row in rows] == [0, 1, 2]
        assert rows[0]["factor"] is None
        for row, before in zip(rows[1:], rows, strict=False):
            assert row["arriving"] == before["accumulated"]
            assert row["factor"] == row["propagated"] / row["arriving"]
