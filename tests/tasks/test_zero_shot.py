"""Zero-shot: both ways agree with lm-eval; one artifact per task, built once, and resumed after interruptions."""

import math

import pytest
import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from layerwise.storage.tables import read_table
from layerwise.tasks.lm_eval_tasks.answers import DOCUMENTS_FILE, read_answers
from layerwise.tasks.zero_shot import ZeroShotSettings
from tests.lm_task_files import answered, give_words, write_task
from tests.simulated_device import simulated_device

WAYS = ["streamed", "memory"]


def by_lm_eval(folder, task):
    """Run lm-eval itself; return its results and its log of every document."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder), softmax_dtype="float32")
    found = evaluate(lm, TaskManager(include_defaults=False).load([task]), bootstrap_iters=10)
    ((name, results),) = found["results"].items()
    return results, found["samples"][name]


@pytest.mark.parametrize(
    ("family", "way"),
    [*((family, way) for family in ("llama", "opt", "gpt2") for way in WAYS), ("gemma4", "streamed")],
)
def test_every_number_agrees_with_lm_eval(local_store, folder_of, lm_tasks, family, way):
    folder = folder_of(family)
    artifacts = answered(local_store, folder, lm_tasks, way)
    for task, name in zip(lm_tasks, ("one", "two"), strict=True):
        results, samples = by_lm_eval(folder, task)
        metrics = read_answers(local_store, artifacts[name]).metrics
        for metric, accuracy in (("acc", metrics.acc), ("acc_norm", metrics.acc_norm)):
            assert accuracy.value == pytest.approx(results[f"{metric},none"])
            assert accuracy.standard_error == pytest.approx(results[f"{metric}_stderr,none"])
        rows = read_table(local_store, artifacts[name], DOCUMENTS_FILE).to_pylist()
        for row, sample in zip(rows, samples, strict=True):
            expected = [response[0] for response in sample["filtered_resps"]]
            assert row["log_probabilities"] == pytest.approx(expected, abs=1e-3)
            assert row["greedy"] == [response[1] for response in sample["filtered_resps"]]
            assert (row["document"], row["acc"]) == (sample["doc_id"], bool(sample["acc"]))


def test_the_streamed_way_computes_on_a_device_from_which_only_scores_return(
    local_store, another_store, folder_of, lm_tasks
):
    folder = folder_of()
    on_cpu = log_probabilities(local_store, answered(local_store, folder, lm_tasks[:1])["one"])
    for gib in (0, 1):
        store = another_store()
        with simulated_device() as traffic:
            execution = {"device": "sim:0", "device_states_bytes": gib << 30}
            found = answered(store, folder, lm_tasks[:1], **execution)["one"]
        for row, expected in zip(log_probabilities(store, found), on_cpu, strict=True):
            assert row == pytest.approx(expected, abs=1e-3)
        if gib:
            assert traffic.to_host == 16 * sum(map(len, on_cpu))


def log_probabilities(store, answers) -> list[list[float]]:
    """Return those of every document's choices."""
    return [row["log_probabilities"] for row in read_table(store, answers, DOCUMENTS_FILE).to_pylist()]


@pytest.mark.parametrize("way", WAYS)
def test_a_sample_of_documents_has_the_same_answers_as_all_documents(local_store, folder_of, lm_tasks, way):
    folder = folder_of()
    every = read_table(
        local_store, answered(local_store, folder, lm_tasks, way)["two"], DOCUMENTS_FILE
    ).to_pylist()
    some = answered(local_store, folder, lm_tasks, way, documents=5, seed=1)["two"]
    rows = read_table(local_store, some, DOCUMENTS_FILE).to_pylist()
    assert len(rows) == 5
    for row in rows:
        same = every[row["document"]]
        assert row["log_probabilities"] == pytest.approx(same["log_probabilities"], abs=1e-3)
        assert row["acc"] == same["acc"]


def test_text_that_is_too_long_for_the_model_is_cut_on_the_left_in_both_ways(
    local_store, folder_of, tmp_path
):
    long = {"question": " ".join(["red", "blue", "green"] * 30), "choices": ["red", "blue car"], "answer": 0}
    task = write_task(tmp_path, "long", [long])
    folder = folder_of("opt")  # has 64 learned positions
    artifacts = [answered(local_store, folder, [task], way)["long"] for way in WAYS]
    assert [read_answers(local_store, each).metrics.truncated for each in artifacts] == [1, 1]
    rows = [read_table(local_store, each, DOCUMENTS_FILE).to_pylist() for each in artifacts]
    assert rows[0][0]["log_probabilities"] == pytest.approx(rows[1][0]["log_probabilities"], abs=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_an_added_task_is_computed_alone_and_does_not_change_the_first(
    local_store, another_store, folder_of, lm_tasks, way
):
    folder = folder_of()
    first = answered(local_store, folder, lm_tasks[:1], way)
    local_store.built.clear()
    both = answered(local_store, folder, lm_tasks, way)
    assert both["one"] == first["one"]
    assert len([key for key in local_store.built if key.startswith("zero_shot/")]) == 1
    at_once = answered(another_store(), folder, lm_tasks, way)
    assert {name: artifact.content for name, artifact in at_once.items()} == {
        name: artifact.content for name, artifact in both.items()
    }


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_computed_twice(local_store, folder_of, lm_tasks, way, computed_layers):
    folder = folder_of()
    first = answered(local_store, folder, lm_tasks, way)
    computed_layers.clear()
    local_store.built.clear()
    assert answered(local_store, folder, lm_tasks, way) == first
    assert computed_layers == []
    assert local_store.built == set()


def test_all_tasks_together_read_the_weights_once(local_store, folder_of, lm_tasks, computed_layers):
    answered(local_store, folder_of(), lm_tasks)
    assert computed_layers == [0, 1, 2]


def test_the_number_of_passes_does_not_change_the_results(
    local_store, another_store, folder_of, lm_tasks, computed_layers, monkeypatch
):
    folder = folder_of()
    in_one = answered(local_store, folder, lm_tasks)
    monkeypatch.setattr("layerwise.tasks.lm_eval_tasks.streamed_scores.TOKENS_PER_PASS", 600)
    computed_layers.clear()
    in_some = answered(another_store(), folder, lm_tasks)
    assert len(computed_layers) >= 6
    assert {name: a.content for name, a in in_some.items()} == {name: a.content for name, a in in_one.items()}


def test_another_tokenizer_gives_another_artifact(local_store, folder_of, lm_tasks):
    folder = folder_of()
    before = answered(local_store, folder, lm_tasks)["one"]
    words = {"unk_token": "<unk>", "eos_token": "</s>"}
    after = answered(local_store, give_words(folder, words), lm_tasks)["one"]
    assert before.key != after.key


def test_the_two_ways_have_separate_artifacts(local_store, folder_of, lm_tasks):
    folder = folder_of()
    streamed, memory = (answered(local_store, folder, lm_tasks, way)["one"] for way in WAYS)
    assert streamed.key != memory.key
    assert streamed.facts["acc"] == memory.facts["acc"]


@pytest.mark.parametrize("way", WAYS)
def test_log_probabilities_of_a_bfloat16_model_are_computed_in_float32(local_store, folder_of, lm_tasks, way):
    """In bfloat16 they have steps of up to 0.25, so that choices tie and the first one wins."""
    artifact = answered(local_store, folder_of(), lm_tasks, way, dtype="bfloat16")["one"]
    rows = read_table(local_store, artifact, DOCUMENTS_FILE).to_pylist()
    values = torch.tensor([value for row in rows for value in row["log_probabilities"]])
    assert (values != values.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("way", WAYS)
def test_log_probabilities_that_are_nan_are_counted_and_never_chosen(
    local_store, folder_of, lm_tasks, edit_tensors, way
):
    folder = folder_of()
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(3e38))  # overflows
    artifact = answered(local_store, folder, lm_tasks, way)["one"]
    assert read_answers(local_store, artifact).metrics.not_finite == 36
    rows = read_table(local_store, artifact, DOCUMENTS_FILE).to_pylist()
    assert {value for row in rows for value in row["log_probabilities"]} == {-math.inf}


def test_a_tokenizer_without_first_and_last_token_is_refused_before_any_work(
    local_store, folder_of, lm_tasks, computed_layers
):
    folder = give_words(folder_of(), {"unk_token": "<unk>"})
    with pytest.raises(ValueError, match="has neither a bos_token nor an eos_token"):
        answered(local_store, folder, lm_tasks)
    assert computed_layers == []


@pytest.mark.parametrize("dtype, way", [("float64", "streamed"), ("float32", "quickly")])
def test_invalid_settings_are_refused(dtype, way):
    with pytest.raises(ValueError, match="zero-shot tasks cannot run with"):
        ZeroShotSettings(dtype, way)


@pytest.mark.parametrize("call", [2, 4, 6])
def test_an_interrupted_streamed_run_resumes_at_the_layer_it_reached(
    local_store, another_store, folder_of, lm_tasks, computed_layers, dying_at, monkeypatch, call
):
    monkeypatch.setattr("layerwise.tasks.lm_eval_tasks.streamed_scores.TOKENS_PER_PASS", 600)
    folder = folder_of()
    undisturbed = answered(another_store(), folder, lm_tasks)
    total = len(computed_layers)
    computed_layers.clear()
    with dying_at("layerwise.tasks.running.layer_boundaries.BoundaryClock.due", call=call):
        answered(local_store, folder, lm_tasks, boundary_layers=1)
    assert len(computed_layers) == call
    resumed = answered(local_store, folder, lm_tasks, boundary_layers=1)
    assert len(computed_layers) == total + 1  # the layer after the last resume point runs again
    assert {n: a.content for n, a in resumed.items()} == {n: a.content for n, a in undisturbed.items()}


def test_an_interrupted_run_in_memory_resumes_at_the_requests_it_reached(
    local_store, another_store, folder_of, lm_tasks, dying_at, monkeypatch
):
    # Eight requests per part give five parts for each task.
    monkeypatch.setattr("layerwise.tasks.lm_eval_tasks.whole_model_answers.REQUESTS_PER_PART", 8)
    folder = folder_of()
    undisturbed = answered(another_store(), folder, lm_tasks, "memory")
    with dying_at("layerwise.tasks.running.layer_boundaries.BoundaryClock.due", call=7):
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


def test_an_interruption_between_tasks_repeats_no_layer(
    local_store, folder_of, lm_tasks, computed_layers, dying_at
):
    folder = folder_of()
    with dying_at("layerwise.tasks.zero_shot._copy_task", call=2):
        answered(local_store, folder, lm_tasks)
    assert computed_layers == [0, 1, 2]
    assert set(answered(local_store, folder, lm_tasks)) == {"one", "two"}
    assert computed_layers == [0, 1, 2]


def test_a_task_added_after_an_interruption_keeps_the_progress_of_the_others(
    local_store, folder_of, lm_tasks, computed_layers, dying_at
):
    folder = folder_of()
    with dying_at("layerwise.tasks.running.layer_boundaries.BoundaryClock.due", call=3):
        answered(local_store, folder, lm_tasks[:1], boundary_layers=1)
    computed_layers.clear()
    assert set(answered(local_store, folder, lm_tasks, boundary_layers=1)) == {"one", "two"}
    assert computed_layers == [2, 0, 1, 2]
