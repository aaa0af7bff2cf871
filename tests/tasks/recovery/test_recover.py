"""Recover: every layer of a plan is an artifact, with the zeros of the pruned plan, and is computed once."""

from dataclasses import replace

import pytest
import torch

from layerwise.pruners.alps import ALPS
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.pruners.wanda import Wanda
from layerwise.pruners.wanda_swaps import WandaSwaps
from layerwise.recovery.layer_recovery import recover_layer
from layerwise.recovery.refit import Refit
from layerwise.recovery.train import Train
from layerwise.storage.artifact import Damaged
from layerwise.storage.tables import read_table
from layerwise.storage.upkeep.set_aside import set_aside
from layerwise.tasks.lanes.recovered_layers import OUTCOMES_FILE, RecoveredLayers
from layerwise.tasks.recovery.recover import recover
from layerwise.tasks.results.roles import LAYERS_RECOVERED
from layerwise.tasks.running.execution import Execution

WINDOWS = {"calibration": 60}
RECOVERS = "layerwise.lanes.recover_layer"


def recover_plan(run, beta=0.1, **execution):
    (plan,) = run.plans([beta])
    (artifact,) = recover.fn(
        run.store, run.inputs(), [plan], run.linears, run.pruning, Execution(**execution)
    )
    return artifact, RecoveredLayers(run.store, plan, run.inputs(), run.pruning)


@pytest.mark.parametrize(
    ("pruner", "pattern"),
    [
        (Wanda(), None),
        (Wanda(), "2:4"),
        (Magnitude(), None),
        (WandaSwaps(), None),
        (SparseGPT(), "2:4"),
        (ALPS(), None),
    ],
    ids=lambda each: each if isinstance(each, str) else getattr(each, "method", "unstructured"),
)
def test_recovered_weights_have_the_zeros_of_the_pruned_ones_and_other_values(small_run, pruner, pattern):
    run = small_run(windows=WINDOWS, pruner=pruner, pattern=pattern, recover=Refit())
    beta = 0.1 if pattern is None else 0.0
    _, layers = recover_plan(run, beta)
    one_shot = replace(run, pruning=run.pruning.one_shot)
    pruned = one_shot.exported_model(one_shot.branch(beta)[0])
    accepted = 0
    for index, linears in enumerate(run.linears):
        weights = layers.weights(index)
        assert weights.keys() in (set(), {linear.name for linear in linears})
        accepted += len(weights)
        for name, weight in weights.items():
            before = pruned.get_submodule(f"model.layers.{index}.{name}").weight
            assert torch.equal(weight == 0, before == 0)
            assert not torch.equal(weight, before)
    assert accepted > 0


@pytest.fixture
def recovered_layers(monkeypatch) -> list[int]:
    """Record the index of every layer that is recovered, in order."""
    recovered: list[int] = []

    def counted(pruned, settings):
        recovered.append(pruned.index)
        return recover_layer(pruned, settings)

    monkeypatch.setattr(RECOVERS, counted)
    return recovered


@pytest.mark.parametrize(
    ("method", "resume_points"), [(Refit(), True), (Refit(), False), (Train(epochs=1), True)]
)
def test_an_interrupted_recovery_goes_on_with_the_next_layer(
    small_run, another_store, dying_at, recovered_layers, computed_layers, method, resume_points
):
    run = small_run(windows=WINDOWS, recover=method)
    run.inputs()
    with dying_at(RECOVERS, call=3):
        recover_plan(run, boundary_layers=1 if resume_points else None)
    recovered_layers.clear()
    computed_layers.clear()
    artifact, layers = recover_plan(run)
    assert recovered_layers == [2]
    # Without a resume point, the hidden states go through the layers that are in the store.
    assert computed_layers == ([2] if resume_points else [0, 1, 2])
    undisturbed = small_run(run.folder, another_store(), windows=WINDOWS, recover=method)
    expected, expected_layers = recover_plan(undisturbed)
    assert artifact.content == expected.content
    assert [layers.find(n).content for n in range(3)] == [expected_layers.find(n).content for n in range(3)]


def test_the_outcome_of_every_layer_is_in_the_result(small_run):
    run = small_run(windows=WINDOWS, recover=Refit())
    artifact, layers = recover_plan(run)
    rows = read_table(run.store, artifact, OUTCOMES_FILE).to_pylist()
    assert [row["layer"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["accepted"] == (row["after"] < row["before"]) == bool(layers.weights(row["layer"]))
    assert artifact.facts[LAYERS_RECOVERED] == sum(row["accepted"] for row in rows)


def test_a_missing_layer_of_a_recovered_plan_is_found_before_the_plan_is_used(small_run, recovered_layers):
    run = small_run(windows=WINDOWS, recover=Refit())
    artifact, layers = recover_plan(run)
    expected = layers.find(1)
    assert set_aside(run.store, Damaged("", expected.key, expected.token))
    with pytest.raises(Damaged, match=r"layers \[1\] are missing") as raised:
        recover_plan(run)
    assert raised.value.key == artifact.key
    with pytest.raises(Damaged, match="layer 1 is missing") as in_evaluation:
        layers.existing(1)
    assert (in_evaluation.value.key, in_evaluation.value.token) == (artifact.key, artifact.token)
    recovered_layers.clear()
    assert set_aside(run.store, raised.value)
    again, layers = recover_plan(run)
    assert recovered_layers == [1]
    assert (again.content, layers.find(1).content) == (artifact.content, expected.content)
