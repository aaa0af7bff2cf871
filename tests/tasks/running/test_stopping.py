"""Stopping: after SIGTERM a stage finishes its layer and stops; the next start resumes there."""

import os
import signal

import pytest

import layerwise.tasks.capture as capture_module
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.stopping import (
    Stopped,
    Withdrawn,
    stop_deferred,
    stopping_on_sigterm,
    withdrawable,
)


@pytest.fixture(autouse=True)
def handled():
    with stopping_on_sigterm():
        yield


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_without_deferral_a_process_stops_at_once():
    with pytest.raises(Stopped, match="stopped by SIGTERM; finished work is kept"):
        terminate()


def test_work_that_ends_before_its_boundary_stops_at_its_end():
    asked = []

    def work():
        with stop_deferred() as asked_to_stop:
            asked.append(asked_to_stop())
            terminate()
            asked.append(asked_to_stop())

    with pytest.raises(Stopped):
        work()
    assert asked == [False, True]


def test_nested_work_stops_at_the_end_of_the_outer_work():
    done = []

    def work():
        with stop_deferred():
            with stop_deferred():
                terminate()
            done.append("outer work goes on")

    with pytest.raises(Stopped):
        work()
    assert done == ["outer work goes on"]


def test_the_previous_handler_is_restored():
    ours = signal.getsignal(signal.SIGTERM)
    with stopping_on_sigterm():
        pass
    assert signal.getsignal(signal.SIGTERM) == ours


def test_another_signal_stops_a_process_like_sigterm():
    with stopping_on_sigterm(signal.SIGUSR1), pytest.raises(Stopped, match="stopped by SIGUSR1; finished"):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_withdrawn_work_ends_at_its_boundary_with_a_resume_point_and_the_process_goes_on(local_store):
    draft = Draft(local_store, Stage("capture", 1))

    def work():
        hourly = Execution(boundary_seconds=3600)
        with boundaries(draft, hourly, lambda state: state.write("state", b"s")) as reached:
            reached(1)
            withdraw()
            reached(2)
            raise AssertionError("the work continued after it was withdrawn")

    with withdrawable() as withdraw, pytest.raises(Withdrawn):
        work()
    again = local_store.draft(Stage("capture", 1))
    again.resume()
    assert again.resumed.step == 2
    withdraw()  # too late: the next work is not concerned
    with stop_deferred() as asked_to_stop:
        assert not asked_to_stop()


def test_a_signal_counts_more_than_a_withdrawal():
    def work():
        with withdrawable() as withdraw, stop_deferred():
            withdraw()
            terminate()

    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        work()


def test_a_resume_point_is_committed_before_the_stop(local_store):
    draft = Draft(local_store, Stage("capture", 1))

    def work():
        hourly = Execution(boundary_seconds=3600)
        with boundaries(draft, hourly, lambda state: state.write("state", b"s")) as reached:
            reached(1)
            terminate()
            reached(2)
            raise AssertionError("the work continued after it was asked to stop")

    with pytest.raises(Stopped):
        work()
    again = local_store.draft(Stage("capture", 1))
    again.resume()
    assert again.resumed.step == 2


read_layers = Checkpoint.layers


def with_a_signal_in_the_second_layer(checkpoint, first=0, *device):
    for index, layer in enumerate(read_layers(checkpoint, first, *device), first):
        if index == 1:
            terminate()
        yield layer


STAGES = {
    "capture": lambda run: run.capture(),
    "branch": lambda run: run.branch(0.25)[0].artifact,
    "export": lambda run: run.export(run.branch(0.25)[0]),
    "evaluate": lambda run: run.evaluate(0.0, 0.25),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_stops_after_its_layer_and_resumes_with_the_next(
    small_run, another_store, monkeypatch, computed_layers, capsys, stage
):
    run = small_run()
    before = {"capture": [], "branch": ["capture"], "export": ["branch"], "evaluate": ["branch"]}
    for each in before[stage]:
        STAGES[each](run)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "layers", with_a_signal_in_the_second_layer)
        with pytest.raises(Stopped):
            STAGES[stage](run)
    computed_layers.clear()
    read_before = run.checkpoint.bytes_read
    resumed = STAGES[stage](run)
    assert "resumed from layer 2 of 3, saved " in capsys.readouterr().err
    if stage == "export":
        (last,) = read_layers(run.checkpoint, 2)
        assert run.checkpoint.bytes_read - read_before == 2 * sum(weight.nbytes for weight in last.values())
    else:
        assert computed_layers == [2]
    undisturbed = small_run(run.folder, another_store())
    assert STAGES[stage](undisturbed).content == resumed.content


def test_an_export_and_the_test_in_one_pass_stop_and_resume_together(
    small_run, another_store, monkeypatch, computed_layers
):
    run = small_run()
    lanes = run.branch(0.0, 0.25)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "layers", with_a_signal_in_the_second_layer)
        with pytest.raises(Stopped):
            run.export_and_test(*lanes)
    computed_layers.clear()
    read_before = run.checkpoint.bytes_read
    exported, tested = run.export_and_test(*lanes)
    assert computed_layers == [1, 2]  # the export stopped before the test computed the second layer
    layers = [sum(weight.nbytes for weight in layer.values()) for layer in read_layers(run.checkpoint)]
    undisturbed = small_run(run.folder, another_store())
    assert undisturbed.export_and_test(*undisturbed.branch(0.0, 0.25))[0].content == exported.content
    assert undisturbed.evaluate(0.0, 0.25).content == tested.content
    outer = sum(tensor.entry.nbytes for tensor in run.checkpoint.outer_tensors().values())
    assert run.checkpoint.bytes_read - read_before == 2 * sum(layers) - layers[0] + outer


def test_a_signal_during_the_computation_of_losses_loses_no_layer(small_run, monkeypatch, computed_layers):
    run = small_run()
    window_losses = capture_module.window_losses

    def with_a_signal(*arguments):
        terminate()
        return window_losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "window_losses", with_a_signal)
        with pytest.raises(Stopped):
            run.capture()
    computed_layers.clear()
    run.capture()
    assert computed_layers == []


def test_work_that_fails_after_a_request_to_stop_raises_stopped():
    def work():
        with stop_deferred():
            terminate()
            raise OSError("the storage is away")

    with pytest.raises(Stopped) as caught:
        work()
    assert str(caught.value.__cause__) == "the storage is away"
    with stop_deferred() as asked_to_stop:
        assert not asked_to_stop()
