"""Zero-shot runs that died go on where they were, and end with the artifacts of an undisturbed one."""

import pytest
from lm_eval.models.huggingface import HFLM

from tests.lm_task_files import answered


@pytest.mark.parametrize("call", [2, 4, 6])
def test_a_streamed_run_that_died_goes_on_from_the_layer_it_had_reached(
    local_store, another_store, folder_of, lm_tasks, computed_layers, dying_at, monkeypatch, call
):
    monkeypatch.setattr("layerwise.tasks.lm_eval_tasks.streamed_scores.TOKENS_PER_PASS", 600)
    folder = folder_of()
    undisturbed = answered(another_store(), folder, lm_tasks)
    total = len(computed_layers)
    computed_layers.clear()
    with dying_at("layerwise.tasks.lanes.layer_boundaries.BoundaryClock.due", call=call):
        answered(local_store, folder, lm_tasks, boundary_layers=1)
    assert len(computed_layers) == call
    resumed = answered(local_store, folder, lm_tasks, boundary_layers=1)
    assert len(computed_layers) == total + 1  # what followed the last resume point was done again
    assert {n: a.content for n, a in resumed.items()} == {n: a.content for n, a in undisturbed.items()}


def test_a_run_in_memory_that_died_goes_on_from_the_requests_it_had_reached(
    local_store, another_store, folder_of, lm_tasks, dying_at, monkeypatch
):
    monkeypatch.setattr(
        "layerwise.tasks.lm_eval_tasks.whole_model_scores.REQUESTS_PER_PART", 8
    )  # five parts for each task
    folder = folder_of()
    undisturbed = answered(another_store(), folder, lm_tasks, "memory")
    with dying_at("layerwise.tasks.lanes.layer_boundaries.BoundaryClock.due", call=7):
        answered(local_store, folder, lm_tasks, "memory", boundary_layers=1)
    asked = []
    loglikelihood = HFLM.loglikelihood

    def counted(lm, requests, **options):
        asked.append(len(requests))
        return loglikelihood(lm, requests, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", counted)
    resumed = answered(local_store, folder, lm_tasks, "memory", boundary_layers=1)
    assert asked == [8, 8, 8, 4]
    assert {n: a.content for n, a in resumed.items()} == {n: a.content for n, a in undisturbed.items()}


def test_a_run_that_died_between_its_tasks_computes_no_layer_again(
    local_store, folder_of, lm_tasks, computed_layers, dying_at
):
    folder = folder_of()
    with dying_at("layerwise.tasks.zero_shot._copy_task", call=2):
        answered(local_store, folder, lm_tasks)
    assert computed_layers == [0, 1, 2]
    assert set(answered(local_store, folder, lm_tasks)) == {"one", "two"}
    assert computed_layers == [0, 1, 2]


def test_a_task_asked_for_in_the_middle_of_a_run_does_not_undo_what_was_begun(
    local_store, folder_of, lm_tasks, computed_layers, dying_at
):
    folder = folder_of()
    with dying_at("layerwise.tasks.lanes.layer_boundaries.BoundaryClock.due", call=3):
        answered(local_store, folder, lm_tasks[:1], boundary_layers=1)
    computed_layers.clear()
    assert set(answered(local_store, folder, lm_tasks, boundary_layers=1)) == {"one", "two"}
    assert computed_layers == [2, 0, 1, 2]
