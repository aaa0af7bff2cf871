"""Work after a finished search: zero-shot tasks and the compressed checkpoint, also in the report."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerwise.flows.cli import main as cli
from layerwise.flows.compress import Compress, compress
from layerwise.flows.distill import Distill, distill
from layerwise.flows.runtime import Runtime
from layerwise.flows.search import search
from layerwise.flows.zero_shot import ZeroShot, zero_shot
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.compressed.checkpoint import load
from layerwise.tasks.report import PAGE_FILE
from layerwise.tasks.results.distillation import read_distillation
from layerwise.tasks.results.garbage import keys_of_results
from tests.lm_task_files import WORDS, give_words, some_documents, write_generated_task, write_task


@pytest.fixture(scope="module")
def done(workshop, prefect_backend, tmp_path_factory):
    """A search of a model whose tokenizer can start a text, and its runtime."""
    folder = tmp_path_factory.mktemp("speaking")
    shutil.copytree(workshop.model, folder / "model")
    give_words(folder / "model")
    text = folder / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    places = {"model": str(folder / "model"), "calibration": str(text), "selection": str(text)}
    runtime = Runtime(store=str(folder / "store"))
    return search(workshop.settings(**places), runtime), runtime


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("tasks")
    return tuple(
        write_task(folder, name, some_documents(20, seed)) for seed, name in enumerate(("one", "two"))
    )


@pytest.fixture(scope="module")
def answered(done, tasks):
    return zero_shot(ZeroShot(tasks=tasks, documents=12), done[1])


def newest(runtime: Runtime, name: str):
    found = [each for each in ArtifactStore(runtime.store).artifacts() if each.recipe["name"] == name]
    return max(found, key=lambda each: each.made["at"])


def names_in(runtime: Runtime) -> list[str]:
    return sorted(each.key for each in ArtifactStore(runtime.store).artifacts())


def test_all_models_answer_the_same_questions(answered):
    assert [(row.task, row.documents) for row in answered.rows] == [("one", 12), ("two", 12)]
    for row in (*answered.rows, answered.average):
        assert row.to_dense.difference == pytest.approx(100 * (row.best.value - row.dense.value))
        assert row.to_uniform.difference == pytest.approx(100 * (row.best.value - row.uniform.value))
    assert answered.average.documents == 24


def test_answers_are_reused_by_later_runs_with_the_same_or_fewer_tasks(done, tasks, answered):
    before = names_in(done[1])
    assert zero_shot(ZeroShot(tasks=tasks, documents=12), done[1]) == answered
    assert names_in(done[1]) == before
    one = zero_shot(ZeroShot(tasks=tasks[:1], documents=12), done[1])
    assert one.rows == answered.rows[:1]
    added = set(names_in(done[1])) - set(before)
    assert not [key for key in added if key.startswith(("zero_shot/", "export"))]


def test_the_zero_shot_table_is_in_the_report_of_the_search(done, answered):
    """There are reports with the table of all tasks and with the table of one task."""
    store = ArtifactStore(done[1].store)
    reports = [each for each in store.artifacts() if each.recipe["name"] == "report"]
    pages = [store.read(each, PAGE_FILE).decode() for each in reports]
    assert ["<td>two</td>" in page for page in pages].count(True) == 1
    assert ["<td>average</td>" in page for page in pages].count(True) >= 1


def test_an_unknown_task_is_refused_before_any_work(done):
    before = names_in(done[1])
    with pytest.raises(ValueError, match="arc_eazy"):
        zero_shot(ZeroShot(tasks=("arc_eazy",)), done[1])
    assert names_in(done[1]) == before


def test_the_compressed_checkpoint_is_the_pruned_model(done):
    store = ArtifactStore(done[1].store)
    folder = compress(Compress(), done[1])
    pruned = AutoModelForCausalLM.from_pretrained(done[0].pruned).state_dict()
    restored = load(store.location(folder)).state_dict()
    assert pruned.keys() == restored.keys()
    assert all(torch.equal(pruned[name], restored[name]) for name in pruned)
    card = store.read(folder, "README.md").decode()
    assert "test text" in card
    assert "set by the allocator atp" in card
    page = store.read(newest(done[1], "report"), PAGE_FILE).decode()
    assert "compressed" in page


def test_compress_exports_the_model_of_a_search_without_export(done, workshop):
    result, runtime = done
    settings = result.settings.model_copy(update={"export": False, "sparsity": 0.4})
    search(settings, runtime)
    before = names_in(runtime)
    compress(Compress(), runtime)
    added = set(names_in(runtime)) - set(before)
    assert [key for key in added if key.startswith("export/")]


def test_the_distilled_checkpoint_is_shown_next_to_the_pruned_one(done, monkeypatch, capsys):
    """It is trained on more windows than the search was calibrated on; the second search of this module is not used."""
    store = ArtifactStore(done[1].store)
    first = min(
        (each for each in store.artifacts() if each.recipe["name"] == "search"), key=lambda a: a.made["at"]
    )
    options = ["--steps", "4", "--windows", "20", "--held-out", "2", "--batch", "2", "--evaluate-every", "2"]
    monkeypatch.setattr(sys, "argv", ["layerwise", "distill", done[1].store, first.key, *options])
    cli.main()
    folder = newest(done[1], "distill")
    result = read_distillation(store, folder)
    shown = capsys.readouterr().out
    assert [row.model for row in result.rows] == ["dense", "pruned", "distilled"]
    assert all(f"{row.test:.2f}" in shown and f"{row.held_out:.2f}" in shown for row in result.rows)
    assert store.location(folder) in shown
    assert (result.windows, result.held_out_windows) == (18, 2)
    assert result.rows[1].test == done[0].test.best
    loaded = AutoModelForCausalLM.from_pretrained(store.location(folder)).state_dict()
    pruned = AutoModelForCausalLM.from_pretrained(done[0].pruned).state_dict()
    assert all(torch.equal(loaded[name] == 0, pruned[name] == 0) for name in pruned)
    page = store.read(newest(done[1], "report"), PAGE_FILE).decode()
    assert "<h2>Distillation</h2>" in page
    assert f"{result.rows[2].test:.2f}" in page
    assert folder.key in keys_of_results(list(store.artifacts()))


def test_a_recovered_model_is_compared_with_the_pruned_one_and_compressed(
    workshop, prefect_backend, tasks, tmp_path
):
    folder = shutil.copytree(workshop.model, tmp_path / "model")
    give_words(folder)
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    text, runtime = str(tmp_path / "text.txt"), Runtime(store=str(tmp_path / "store"))
    places = {"model": str(folder), "calibration": text, "selection": text, "calibration_windows": 50}
    result = search(workshop.settings(**places, betas=[0.1], recover="refit"), runtime)
    answers = zero_shot(ZeroShot(tasks=tasks[:1], documents=12), runtime)
    (row,) = answers.rows
    assert row.to_pruned.difference == pytest.approx(100 * (row.best.value - row.pruned.value))
    recovered = load(ArtifactStore(runtime.store).location(compress(Compress(), runtime))).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(result.pruned).state_dict()
    assert all(torch.equal(recovered[name], exported[name]) for name in exported)
    card = (Path(result.pruned) / "README.md").read_text()
    compressed = ArtifactStore(runtime.store).read(newest(runtime, "compress"), "README.md").decode()
    assert result.recovery_text in card
    assert result.recovery_text in compressed
    page = ArtifactStore(runtime.store).read(newest(runtime, "report"), PAGE_FILE).decode()
    assert "<h2>Without and with recovery</h2>" in page
    assert "before recovery" in page


def test_a_search_that_pruned_other_linears_is_not_continued(done, monkeypatch):
    monkeypatch.setattr("layerwise.models.prunable_linears.KEPT_DENSE", re.compile("down_proj$"))
    before = names_in(done[1])
    with pytest.raises(ValueError, match="prunes other linears of this model. Run the search again"):
        compress(Compress(), done[1])
    assert names_in(done[1]) == before


def test_more_windows_than_the_calibration_text_has_are_refused(done):
    with pytest.raises(ValueError, match="1000 x 16 = 16000 are needed"):
        distill(Distill(windows=1000), done[1])


def test_the_command_shows_no_progress_bars_of_lm_eval(done, tasks, answered, prefect_backend):
    store = ArtifactStore(done[1].store)
    first = min(
        (each for each in store.artifacts() if each.recipe["name"] == "search"), key=lambda a: a.made["at"]
    )
    options = ["--search", first.key, "--tasks", ",".join(tasks), "--documents", "12"]
    command = subprocess.run(
        [sys.executable, "-m", "layerwise", "zero-shot", "--store", done[1].store, *options],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PREFECT_API_URL": prefect_backend},
        capture_output=True,
        text=True,
    )
    assert command.returncode == 0, command.stderr
    assert "average" in command.stdout
    assert "it/s" not in command.stderr


def test_artifacts_made_from_a_result_are_kept_with_the_results(done, answered):
    compress(Compress(), done[1])
    kept = keys_of_results(list(ArtifactStore(done[1].store).artifacts()))
    assert {"compress", "report", "zero_shot_table", "search"} <= {key.partition("/")[0] for key in kept}
    assert not [key for key in kept if key.startswith(("lane/", "zero_shot/", "capture/"))]


def test_zero_shot_and_compress_are_commands(done, tasks, answered, monkeypatch, capsys):
    """The first search is named, as the newest may belong to another test."""
    key = [each for each in names_in(done[1]) if each.startswith("search/")]
    store = ArtifactStore(done[1].store)
    first = min(key, key=lambda each: store.get(each).made["at"])
    given = ["--store", done[1].store, "--search", first]
    options = ["--tasks", ",".join(tasks), "--documents", "12"]
    for command in (["zero-shot", *given, *options], ["compress", *given]):
        monkeypatch.setattr(sys, "argv", ["layerwise", *command])
        cli.main()
    shown = capsys.readouterr().out
    assert "average" in shown
    assert "Compressed model:" in shown


def test_few_shot_accuracies_and_lengths_of_answers_are_shown_everywhere(done, tmp_path, capsys, monkeypatch):
    store = ArtifactStore(done[1].store)
    task = write_generated_task(tmp_path, "writing", some_documents(10, 5))
    searches = [each for each in store.artifacts() if each.recipe["name"] == "search"]
    first = min(searches, key=lambda each: each.made["at"]).key
    streamed = {"search": first, "tasks": (f"{task}:2",)}
    before = names_in(done[1])
    with pytest.raises(ValueError, match="Use --way memory"):
        zero_shot(ZeroShot(**streamed), done[1])
    assert names_in(done[1]) == before
    options = ["--search", first, "--tasks", task, "--fewshot", "2", "--way", "memory"]
    monkeypatch.setattr(sys, "argv", ["layerwise", "zero-shot", "--store", done[1].store, *options])
    cli.main()
    shown = capsys.readouterr().out
    row, average = zero_shot(ZeroShot(**streamed, way="memory"), done[1]).rows[0], "average"
    assert (row.shots, row.metric) == (2, "exact_match,whole")
    assert row.to_uniform.difference == pytest.approx(100 * (row.best.value - row.uniform.value))
    length = f"{row.lengths['best'].tokens:.1f} ({row.lengths['best'].cut} cut)"
    page = store.read(newest(done[1], "report"), PAGE_FILE).decode()
    card = store.read(compress(Compress(search=first), done[1]), "README.md").decode()
    for text in (page, card):
        assert all(
            each in text for each in ("writing", "exact_match,first-word", "tokens, best", length, average)
        )
    assert "writing" in shown
