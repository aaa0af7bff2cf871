"""Few-shot tasks, groups of tasks and generated answers: equal to lm-eval's own run of the model."""

import json
from pathlib import Path

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

DRAWN = {"documents": 7, "seed": 3}


@pytest.fixture
def group(tmp_path) -> str:
    """A group of two tasks of different sizes, averaged by size, of which one draws its examples from another split."""
    members = []
    for name, count in (("small", 5), ("large", 14)):
        examples = (
            {"fewshot_split": "validation"} if name == "small" else {"fewshot_config": {"sampler": "first_n"}}
        )
        members.append(
            json.loads(
                Path(write_task(tmp_path, name, some_documents(count, seed=count), **examples)).read_text()
            )
        )
    rules = [{"metric": "acc", "weight_by_size": True}]
    path = tmp_path / "group" / "both.yaml"
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
        bootstrap_iters=0,
        task_manager=manager,
    )


def answers_of(store, folder, tasks, way="memory", **options):
    loaded = load_tasks(tasks, **options)
    checkpoint = import_checkpoint(store, str(folder))
    settings = ZeroShotSettings("float32", way)
    return loaded, zero_shot.fn(store, checkpoint, loaded.questions, settings, Execution())


@pytest.mark.parametrize("way", ["streamed", "memory"])
def test_examples_of_a_group_are_those_of_lm_eval_and_its_average_too(local_store, folder_of, group, way):
    folder = folder_of()
    loaded, artifacts = answers_of(local_store, folder, [f"{group}:2"], way, **DRAWN)
    chosen = {
        of_task.task: list(of_task.document_ids) for of_task in loaded.questions if of_task.available > 7
    }
    expected = by_lm_eval(folder, group, 2, chosen | {"both::small": None})
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
    assert comparison.average.best.value == row.best.value
    shown = comparison_rows(comparison)
    assert [each["task"] for each in shown] == ["both", "- both::small", "- both::large", "average"]
    assert shown[0]["examples"] == 2


def test_generated_answers_and_their_length_are_those_of_lm_eval(local_store, folder_of, tmp_path):
    folder = folder_of()
    task = write_generated_task(tmp_path, "writing", some_documents(20, seed=1), num_fewshot=1)
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
        assert (row["acc"], row["exact_match,first-word"]) == (
            bool(whole["exact_match"]),
            bool(word["exact_match"]),
        )
        prompt = tokenizer(whole["arguments"][0][0], return_tensors="pt")
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
    assert 0 < metrics.length.cut < 20
