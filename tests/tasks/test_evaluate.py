"""Evaluate: the test perplexities, compared with transformers, taken once and by nobody else."""

import math

import pytest
import torch

from storage.corrupt import Corrupt
from tasks.evaluate import read_test
from tasks.sample_tokens import TOKENS_FILE

MODES = pytest.mark.parametrize("mode", ["dense", "sequential"])


@MODES
def test_the_three_perplexities_are_those_of_the_three_models(small_run, mode):
    run = small_run(calibration_mode=mode)
    uniform, best = run.branch(0.0, 0.25)
    test = read_test(run.store, run.evaluate(0.0, 0.25))
    models = {
        "dense": run.transformers_model(),
        "uniform": run.exported_model(uniform),
        "best": run.exported_model(best),
    }
    losses = {name: torch.tensor(run.losses(model, "test")) for name, model in models.items()}
    assert test.windows == 2
    for name, values in losses.items():
        assert getattr(test, name) == pytest.approx(values.mean().exp().item(), rel=1e-5)
    assert test.gain.mean == pytest.approx((losses["best"] - losses["uniform"]).mean().item(), abs=1e-5)
    assert test.gain.mean == pytest.approx(math.log(test.best / test.uniform))


def test_where_uniform_is_the_best_it_is_scored_once(small_run, computed_layers):
    run = small_run()
    run.capture()
    computed_layers.clear()
    artifact = run.evaluate(0.0, 0.0)
    test = read_test(run.store, artifact)
    assert test.best == test.uniform
    assert test.gain is None
    assert {name.split("/")[0] for name in artifact.files} == {"dense", "uniform", "test.json"}
    assert computed_layers == [0, 1, 2]


def test_perplexities_are_facts_too(small_run):
    run = small_run()
    artifact = run.evaluate(0.0, 0.25)
    test = read_test(run.store, artifact)
    assert artifact.facts["dense"] == test.dense
    assert artifact.facts["uniform"] == test.uniform
    assert artifact.facts["best"] == test.best


def test_nothing_but_the_evaluation_needs_the_test_windows(small_run):
    run = small_run()
    run.store.fs.rm(f"{run.store.root}/{run.windows['test'].files[TOKENS_FILE].path}")
    run.export(run.branch(0.25)[0])
    with pytest.raises(Corrupt, match="is missing"):
        run.evaluate(0.0, 0.25)


def test_the_test_is_taken_once(small_run, computed_layers):
    run = small_run()
    first = run.evaluate(0.0, 0.25)
    computed_layers.clear()
    assert run.evaluate(0.0, 0.25) == first
    assert computed_layers == []


@MODES
def test_an_interrupted_evaluation_goes_on_from_its_last_boundary(
    small_run, another_store, dying_at, computed_layers, mode
):
    run = small_run(calibration_mode=mode)
    run.capture()
    computed_layers.clear()
    with dying_at("tasks.boundaries.BoundaryClock.due", call=3):
        run.evaluate(0.0, 0.25, boundary_layers=1)
    computed_layers.clear()
    resumed = run.evaluate(0.0, 0.25, boundary_layers=1)
    assert computed_layers == [2]
    undisturbed = small_run(run.folder, another_store(), calibration_mode=mode)
    assert resumed.content == undisturbed.evaluate(0.0, 0.25).content
