"""Lane group: errors, losses and statistics agree with whole models of transformers."""

import pytest
import torch

from layerwise.storage.tables import read_table
from layerwise.tasks.lanes.statistics_table import read_statistics

MODES = pytest.mark.parametrize("mode", ["dense", "sequential"])


def hidden_states(model, prefix, input_ids):
    """Return the output of every decoder layer."""
    outputs, hooks = [], []
    for layer in model.get_submodule(prefix):

        def keep(_, inputs, output):
            outputs.append(output if isinstance(output, torch.Tensor) else output[0])

        hooks.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=input_ids)
    for hook in hooks:
        hook.remove()
    return outputs


def inputs_of(layer, linears, model, input_ids):
    """Return the input of each of the ``linears`` of ``layer``."""
    inputs = {}
    for name in linears:

        def keep(_, arguments, name=name):
            inputs[name] = arguments[0]

        layer.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=input_ids)
    return inputs


@MODES
def test_reconstruction_errors_compare_the_pruned_with_the_dense_model(small_run, mode):
    run = small_run(calibration_mode=mode)
    lane = run.branch(0.0, 0.3)[1]
    windows, prefix = run.input_ids("test"), run.checkpoint.layer_prefix
    dense = hidden_states(run.transformers_model(), prefix, windows)
    pruned = hidden_states(run.exported_model(lane), prefix, windows)
    layers = read_table(run.store, run.evaluate(0.0, 0.3), "best/layers.parquet").to_pylist()
    for row, expected, output in zip(layers, dense, pruned, strict=True):
        assert row["error"] == pytest.approx((output - expected).square().sum().item(), rel=1e-4)
        assert row["dense_energy"] == pytest.approx(expected.square().sum().item(), rel=1e-4)


@MODES
def test_losses_agree_with_the_pruned_model(small_run, mode):
    run = small_run(calibration_mode=mode)
    lane = run.branch(0.0, 0.3)[1]
    model = run.exported_model(lane)
    assert list(lane.losses) == pytest.approx(run.losses(model, "selection"), rel=1e-5)


def test_sequential_calibration_uses_the_outputs_of_the_pruned_layers_before(small_run):
    """As in the published Wanda: layers below n are pruned, layer n is still dense."""
    run = small_run(calibration_mode="sequential")
    lane = run.branch(0.0, 0.3)[1]
    pruned = run.exported_model(lane)
    for index in range(3):
        model = run.transformers_model()
        for below in range(index):
            model.model.layers[below] = pruned.model.layers[below]
        found = read_statistics(run.store, lane.artifact, index)
        inputs = inputs_of(model.model.layers[index], found, model, run.input_ids("calibration"))
        for name, statistics in found.items():
            expected = inputs[name].double().square().sum(dim=(0, 1))
            torch.testing.assert_close(statistics.sum_of_squares, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("mode", "the_same"), [("dense", True), ("sequential", False)])
def test_a_mask_is_independent_of_the_layers_below_only_with_dense_calibration(small_run, mode, the_same):
    """Beta 0 and 0.25 both remove half of the middle layer of three, but different fractions of the first."""
    run = small_run(calibration_mode=mode)
    flat, steep = (run.export(lane) for lane in run.branch(0.0, 0.25))
    middle = "model-00005-of-00006.safetensors"  # after the shards outside of the layers and the first layer
    assert (run.store.read(flat, middle) == run.store.read(steep, middle)) is the_same


def test_losses_do_not_depend_on_the_batch_size(small_run, another_store, monkeypatch):
    run = small_run()
    lane = run.branch(0.0, 0.3)[1]
    monkeypatch.setattr("layerwise.models.hidden_states.TOKENS_PER_FORWARD", 24)  # two windows instead of all
    other = small_run(run.folder, another_store())
    assert list(other.branch(0.3)[0].losses) == pytest.approx(lane.losses, rel=1e-5)


def test_lanes_in_another_dtype_have_the_masks_of_the_export(small_run):
    """In bfloat16 many float32 weights become equal; ranking uses the values in the files."""
    run = small_run(dtype="bfloat16")
    lane = run.branch(0.0, 0.3)[1]
    model = run.exported_model(lane)
    weights = model.state_dict()
    for row in read_table(run.store, lane.artifact, "linears.parquet").to_pylist():
        weight = weights[f"model.layers.{row['layer']}.{row['linear']}.weight"]
        assert row["zeros"] == int((weight == 0).sum())
    exported = run.losses(model, "selection")
    assert list(lane.losses) == pytest.approx(exported, rel=1e-3)
