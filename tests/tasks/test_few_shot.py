"""Few-shot tasks, groups of tasks and generated answers: equal to lm-eval's own run of the model."""

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerwise.storage.tables import read_table
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.lm_eval_tasks.answers import DOCUMENTS_FILE, read_answers
from layerwise.tasks.lm_eval_tasks.comparison import compare_zero_shot, comparison_rows
from layerwise.tasks.lm_eval_tasks.task_loading import load_tasks
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.zero_shot import ZeroShotSettings, zero_shot
from tests.lm_task_files import some_documents, write_generated_task, write_task

DRAWN = {"documents": 7, "seed": 3}  # of the larger task; the smaller one is asked completely


def write_group(folder: Path, weight_by_size: bool) -> str:
    """Write a group of two tasks of different sizes; one draws its examples at random, the other takes the first."""
    members = []
    for count, sampler in ((5, "default"), (14, "first_n")):
        own = {"fewshot_split": "validation", "fewshot_config": {"sampler": sampler}}
        task = write_task(folder, sampler, some_documents(count, seed=count), **own)
        members.append(json.loads(Path(task).read_text()))
    rules = [{"metric": "acc", "weight_by_size": weight_by_size}]
    path = folder / "group" / "both.yaml"
    path.parent.mkdir()
    path.write_text(json.dumps({"group": "both", "task": members, "aggregate_metric_list": rules}))
    return str(path)


def by_lm_eval(folder, task: str, shots: int | None, documents: dict[str, list[int]] | None = None):
    """Run lm-eval itself on the model; with some documents, it is asked the same ones."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lm = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder), softmax_dtype="float32", batch_size=8)
    manager = TaskManager(include_defaults=False, include_path=str(Path(task).parent))
    return simple_evaluate(
        lm,
        tasks=[Path(task).stem],
        num_fewshot=shots,
        samples=documents,
        bootstrap_iters=10,
        task_manager=manager,
    )


def answers_of(store, folder, tasks, way="memory", boundary_layers=None, **options):
    loaded = load_tasks(tasks, **options)
    checkpoint = import_checkpoint(store, str(folder))
    settings = ZeroShotSettings("float32", way)
    return loaded, zero_shot.fn(
        store, checkpoint, loaded.questions, settings, Execution(boundary_layers=boundary_layers)
    )


@pytest.mark.parametrize("way, by_size", [("streamed", True), ("memory", False)])
def test_examples_of_a_group_are_those_of_lm_eval_and_its_average_too(
    local_store, folder_of, tmp_path, way, by_size
):
    folder, group = folder_of(), write_group(tmp_path, by_size)
    loaded, artifacts = answers_of(local_store, folder, [f"{group}:2"], way, **DRAWN)
    chosen = {
        of_task.task: list(of_task.document_ids) for of_task in loaded.questions if of_task.available > 7
    }
    expected = by_lm_eval(folder, group, 2, chosen | {"both::default": None})
    for of_task in loaded.questions:
        samples = expected["samples"][of_task.task]
        assert of_task.shots == 2
        rows = read_table(local_store, artifacts[of_task.task], DOCUMENTS_FILE).to_pylist()
        for row, sample, requests in zip(rows, samples, of_task.requests, strict=True):
            assert [tuple(asked) for asked in sample["arguments"]] == requests
            values = [response[0] for response in sample["filtered_resps"]]
            assert row["log_probabilities"] == pytest.approx(values, abs=1e-3)
            assert (row["document"], row["acc"]) == (sample["doc_id"], bool(sample["acc"]))
    comparison = compare_zero_shot(local_store, artifacts, None, artifacts, None, loaded.groups)
    (row,) = comparison.groups
    results = expected["groups"]["both"]
    assert (row.task, row.documents, row.shots) == ("both", 12, 2)
    assert row.best.value == pytest.approx(results["acc,none"])
    assert row.best.standard_error == pytest.approx(results["acc_stderr,none"])
    assert comparison.average.best.value == row.best.value
    shown = comparison_rows(comparison)
    assert [each["task"] for each in shown] == ["both", "- both::default", "- both::first_n", "average"]
    assert shown[0]["examples"] == 2


def test_generated_answers_and_their_length_are_those_of_lm_eval(local_store, folder_of, tmp_path):
    folder = folder_of()  # has 64 positions, too few for the last prompt
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 1.5}))
    documents = some_documents(20, seed=1)
    documents.append({**documents[0], "question": "red blue green " * 30})
    task = write_generated_task(tmp_path, "writing", documents, num_fewshot=1)
    _, artifacts = answers_of(local_store, folder, [task])
    expected = by_lm_eval(folder, task, None)
    table = read_table(local_store, artifacts["writing"], DOCUMENTS_FILE).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    by_filter = {
        name: [each for each in expected["samples"]["writing"] if each["filter"] == name]
        for name in ("whole", "first-word")
    }
    for row, whole, word in zip(table, *by_filter.values(), strict=True):
        assert row["response"] == whole["resps"][0][0]
        assert row["tokens"] == len(tokenizer(row["response"], add_special_tokens=False)["input_ids"])
        assert (row["acc"], row["acc by exact_match,first-word"]) == (
            bool(whole["exact_match"]),
            bool(word["exact_match"]),
        )
        prompt = tokenizer(whole["arguments"][0][0], return_tensors="pt")
        prompt = {name: values[:, -(64 - 12) :] for name, values in prompt.items()}
        written = model.generate(**prompt, do_sample=False, max_new_tokens=12)[
            0, prompt["input_ids"].shape[1] :
        ]
        ended = (
            len(written) < 12
            or written[-1] == tokenizer.eos_token_id
            or "redcar" in tokenizer.decode(written).split()
        )
        assert row["cut"] == (not ended)
    metrics = read_answers(local_store, artifacts["writing"]).metrics
    results = expected["results"]["writing"]
    assert (metrics.metric, metrics.shots) == ("exact_match,whole", 1)
    assert metrics.acc.value == pytest.approx(results["exact_match,whole"])
    assert metrics.others["exact_match,first-word"].value == pytest.approx(results["exact_match,first-word"])
    assert 0 < metrics.length.cut < 21
    assert metrics.length.tokens == pytest.approx(fmean(row["tokens"] for row in table))
    assert (
        metrics.truncated
        == sum(len(tokenizer(each["arguments"][0][0])["input_ids"]) > 52 for each in by_filter["whole"])
        > 0
    )


def test_an_interrupted_generation_resumes_at_the_batch_it_reached(
    local_store, another_store, folder_of, tmp_path, dying_at, monkeypatch
):
    folder = folder_of()
    scored = write_task(tmp_path, "one", some_documents(6))
    written = write_generated_task(tmp_path, "writing", some_documents(20, seed=1))
    _, undisturbed = answers_of(another_store(), folder, [written, scored])
    with dying_at("layerwise.tasks.running.layer_boundaries.BoundaryClock.due", call=3):
        answers_of(local_store, folder, [written, scored], boundary_layers=1)
    generated = []
    generate = HFLM.generate_until

    def counted(lm, requests, **options):
        generated.append(len(requests))
        return generate(lm, requests, **options)

    monkeypatch.setattr(HFLM, "generate_until", counted)
    _, resumed = answers_of(local_store, folder, [written, scored], boundary_layers=1)
    assert generated == [8, 4]  # the first of three batches was done
    assert {n: a.content for n, a in resumed.items()} == {n: a.content for n, a in undisturbed.items()}


def test_generated_answers_of_a_streamed_model_are_refused_with_their_cost(local_store, folder_of, tmp_path):
    task = write_generated_task(tmp_path, "writing", some_documents(4))
    with pytest.raises(ValueError, match=r"writing: .* up to 12 tokens.* 12 passes, .* Use --way memory"):
        answers_of(local_store, folder_of(), [task], "streamed")


def test_answers_longer_than_the_model_are_refused(local_store, folder_of, tmp_path):
    task = write_generated_task(
        tmp_path, "writing", some_documents(4), generation_kwargs={"until": [], "max_gen_toks": 64}
    )
    with pytest.raises(ValueError, match="answers of up to 64 tokens, but the model has 64 positions"):
        answers_of(local_store, folder_of("opt"), [task])


@pytest.mark.parametrize(
    "own, number, fewshot, expected",
    [
        ({}, "", None, 0),
        ({"num_fewshot": 2}, "", None, 2),
        ({"num_fewshot": 2}, "", 3, 3),
        ({"num_fewshot": 2}, ":0", 3, 0),
        ({}, ":4", 3, 4),
        ({"num_fewshot": 0}, "", 3, 0),
    ],
)
def test_the_number_of_examples_is_that_of_the_task_the_option_or_the_file(
    tmp_path, own, number, fewshot, expected
):
    task = write_generated_task(tmp_path, "writing", some_documents(6), **own)
    (questions,) = load_tasks([task + number], fewshot=fewshot).questions
    assert questions.shots == expected
    assert questions.requests[0][0][0].count("\n\n") == expected


@pytest.mark.parametrize(
    "own, number, message",
    [
        ({"num_fewshot": 0}, ":2", "sets num_fewshot to 0, which lm-eval never changes"),
        ({}, ":7", "cannot be asked with 7 examples"),
        ({"generation_kwargs": {"do_sample": True, "temperature": 0.5}}, "", "draws its answers at random"),
        ({"generation_kwargs": {"temperature": 0.5}}, "", "draws its answers at random"),
        ({"repeats": 4}, "", "draws its answers at random"),
        ({"metric_list": [{"metric": "bleu"}]}, "", "no metric that says whether an answer is right"),
        ({"filter_list": [{"name": "x", "filter": [{"function": "none such"}]}]}, "", "cannot be loaded"),
    ],
)
def test_tasks_that_cannot_be_compared_are_refused_before_any_work(tmp_path, own, number, message):
    task = write_generated_task(tmp_path, "writing", some_documents(6), **own)
    with pytest.raises(ValueError, match=message):
        load_tasks([task + number])


def test_another_filter_gives_another_identity_of_the_same_questions(tmp_path):
    filters = [{"name": "last", "filter": [{"function": "take_first"}]}]
    (before,) = load_tasks([write_generated_task(tmp_path, "writing", some_documents(4))]).questions
    changed = write_generated_task(tmp_path, "writing", some_documents(4), filter_list=filters)
    (after,) = load_tasks([changed]).questions
    assert before.requests == after.requests
    assert before.identity != after.identity
