"""Capture: statistics, losses and hidden states agree with transformers, with and without interruptions."""

import signal
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from layerwise.storage.tables import read_table
from layerwise.storage.tensors import read_tensors
from layerwise.tasks.capture import boundary_file
from layerwise.tasks.lanes.statistics_table import read_statistics


def small_gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=64))


@pytest.fixture(params=["llama", "gpt2"])
def run(request, small_run):
    """Return a run with torch's linears, and one with GPT-2's transposed linears."""
    return small_run(small_gpt2() if request.param == "gpt2" else None)


def summed_squares_of_inputs(model, layer_prefix, input_ids):
    """Return the sum of squares of every input channel, by layer and linear, from hooks on the whole model."""
    sums, hooks = {}, []
    for index, layer in enumerate(model.get_submodule(layer_prefix)):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                sums[index, name] = 0

                def see(_, inputs, key=(index, name)):
                    sums[key] += inputs[0].double().square().sum(dim=(0, 1))

                hooks.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        model(input_ids=input_ids)
    for hook in hooks:
        hook.remove()
    return sums


def test_statistics_agree_with_hooks_on_the_whole_model_for_the_calibration_windows(run):
    captured = run.capture()
    model, calibration = run.transformers_model(), run.input_ids("calibration")
    expected = summed_squares_of_inputs(model, run.checkpoint.layer_prefix, calibration)
    found = {
        (layer, linear): statistics
        for layer in range(3)
        for linear, statistics in read_statistics(run.store, captured, layer).items()
    }
    assert set(found) == set(expected)
    for key, statistics in found.items():
        assert statistics.tokens == calibration.numel()
        torch.testing.assert_close(statistics.sum_of_squares, expected[key], rtol=1e-4, atol=1e-6)


def test_dense_losses_agree_with_transformers_for_every_window(run):
    losses = read_table(run.store, run.capture(), "losses.parquet")["loss"].to_pylist()
    assert losses == pytest.approx(run.losses(run.transformers_model(), "selection"), rel=1e-5)


def test_without_retention_no_hidden_states_are_kept(run):
    assert not [name for name in run.capture("none").files if "hidden_states" in name]


@pytest.mark.parametrize(("retention", "kept"), [("sampled", (4, 3)), ("all", (5, 3))])
def test_retained_hidden_states_agree_with_transformers_at_every_boundary(run, retention, kept):
    captured = run.capture(retention)
    model = run.transformers_model()
    norm = model.get_submodule(
        {"model.layers": "model.norm", "transformer.h": "transformer.ln_f"}[run.checkpoint.layer_prefix]
    )
    files = sorted(name for name in captured.files if "hidden_states" in name)
    assert files == [boundary_file(boundary) for boundary in range(4)]
    for role, count in zip(("calibration", "selection"), kept, strict=True):
        with torch.no_grad():
            expected = model(input_ids=run.input_ids(role), output_hidden_states=True).hidden_states
        for boundary, file in enumerate(files):
            states = read_tensors(run.store, captured, file)[role]
            if boundary == 3:  # transformers returns the last hidden states after the final norm
                states = norm(states)
            assert states.shape == (count, 12, 32)
            torch.testing.assert_close(states, expected[boundary][:count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("finished_layers", [0, 1, 2])
def test_an_interrupted_capture_resumes_from_its_last_boundary(
    store, small_run, another_store, dying_at, computed_layers, finished_layers
):
    run = small_run(store=store)
    with dying_at("layerwise.tasks.capture.write_statistics", call=finished_layers + 1):
        run.capture("all", boundary_layers=1)
    assert computed_layers == list(range(finished_layers + 1))
    computed_layers.clear()
    resumed = run.capture("all", boundary_layers=1)
    assert computed_layers == list(range(finished_layers, 3))
    undisturbed = small_run(run.folder, another_store()).capture("all")
    assert resumed.content == undisturbed.content
    assert resumed.key == undisturbed.key


def test_a_capture_interrupted_twice_is_bit_identical(small_run, another_store, dying_at):
    run = small_run()
    for call in (2, 2):
        with dying_at("layerwise.tasks.capture.write_statistics", call=call):
            run.capture(boundary_layers=1)
    undisturbed = small_run(run.folder, another_store()).capture()
    assert run.capture(boundary_layers=1).content == undisturbed.content


def test_without_a_resume_point_an_interrupted_capture_starts_again(small_run, dying_at, computed_layers):
    run = small_run()
    with dying_at("layerwise.tasks.capture.write_statistics", call=3):
        run.capture()
    computed_layers.clear()
    run.capture()
    assert computed_layers == [0, 1, 2]


def test_a_resume_point_is_also_due_after_some_time(small_run, dying_at, computed_layers):
    run = small_run()
    with dying_at("layerwise.tasks.capture.write_statistics", call=2):
        run.capture(boundary_seconds=0.0)
    computed_layers.clear()
    run.capture()
    assert computed_layers == [1, 2]


KILLED_IN_LAYER_2 = """
import os, signal, sys
import layerwise.tasks.capture as stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.import_checkpoint import import_checkpoint

url, folder, calibration, selection = sys.argv[1:]
store, write = ArtifactStore(url), stage.write_statistics

def killed(draft, layer, statistics):
    if layer == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(draft, layer, statistics)

stage.write_statistics = killed
windows = store.get(calibration), store.get(selection)
settings, execution = stage.CaptureSettings("float32"), Execution(boundary_layers=1)
stage.capture.fn(store, import_checkpoint(store, folder), *windows, settings, execution)
"""


def test_another_process_finishes_the_capture_of_a_killed_one(
    small_run, another_store, computed_layers, pytestconfig
):
    run = small_run()
    windows = run.windows["calibration"].key, run.windows["selection"].key
    command = [sys.executable, "-c", KILLED_IN_LAYER_2, run.store.url, str(run.folder), *windows]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    finished = run.capture(boundary_layers=1)
    assert computed_layers == [2]
    undisturbed = small_run(run.folder, another_store()).capture()
    assert finished.content == undisturbed.content


def test_a_damaged_resume_point_is_not_used(small_run, another_store, dying_at, computed_layers):
    run = small_run()
    with dying_at("layerwise.tasks.capture.write_statistics", call=3):
        run.capture(boundary_layers=1)
    (state,) = (path for path in run.files() if path.endswith("hidden_states.safetensors"))
    content = bytearray(run.store.fs.cat_file(state))
    content[-1] ^= 1
    run.store.fs.pipe_file(state, bytes(content))
    computed_layers.clear()
    captured = run.capture(boundary_layers=1)
    assert computed_layers == [0, 1, 2]
    assert captured.content == small_run(run.folder, another_store()).capture().content


def test_a_dense_model_that_overflows_its_dtype_is_refused(small_run, llama):
    model = llama(num_hidden_layers=3)
    model.model.layers[1].mlp.up_proj.weight.data *= 1e5
    model.model.layers[1].mlp.down_proj.weight.data *= 1e5
    run = small_run(model, dtype="float16")
    with pytest.raises(ValueError, match="layer 1 of .* NaN or infinity in float16.*--dtype bfloat16"):
        run.capture()


def test_a_head_that_overflows_its_dtype_is_refused(small_run, llama):
    model = llama(num_hidden_layers=3)
    model.lm_head.weight.data *= 1e5
    run = small_run(model, dtype="float16")
    with pytest.raises(
        ValueError, match="not finite on 3 of 3 selection windows in float16.*--dtype bfloat16"
    ):
        run.capture()


def test_a_finished_capture_leaves_no_files_besides_its_artifact(small_run):
    run = small_run()
    before = run.files()
    captured = run.capture(boundary_layers=1)
    files = {f"{run.store.root}/{file.path}" for file in captured.files.values()}
    assert run.files() - before == files | {f"{run.store.root}/{captured.key}/manifest.json"}


def test_a_second_capture_computes_and_reads_nothing(small_run, computed_layers):
    run = small_run()
    first = run.capture()
    computed_layers.clear()
    read = run.checkpoint.bytes_read
    assert run.capture() == first
    assert computed_layers == []
    assert run.checkpoint.bytes_read == read


def test_every_weight_is_read_once(small_run):
    run = small_run()
    captured = run.capture()
    weights = sum(run.checkpoint.index.layer_bytes) + run.checkpoint.index.outer_bytes
    assert run.checkpoint.bytes_read == weights
    assert captured.facts["weights read, bytes"] == weights


def test_hidden_states_on_disk_give_the_same_capture(small_run, another_store, tmp_path):
    run = small_run()
    in_memory = run.capture("all")
    on_disk = small_run(run.folder, another_store())
    assert on_disk.capture("all", hidden_states_bytes=0, scratch=tmp_path).content == in_memory.content


def test_retention_changes_the_key_of_a_capture_but_not_of_its_lanes(small_run):
    run = small_run()
    (lane,) = run.branch(0.0)
    assert run.capture("all").key != run.capture("none").key
    assert run.branch(0.0)[0].artifact.key == lane.artifact.key


def test_in_bfloat16_the_loss_is_that_of_the_model_loaded_in_bfloat16(small_run):
    run = small_run(dtype="bfloat16")
    losses = read_table(run.store, run.capture(), "losses.parquet")["loss"].to_pylist()
    assert losses == pytest.approx(run.losses(run.transformers_model(), "selection"), rel=1e-3)
