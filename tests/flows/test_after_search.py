"""Work after a finished search: zero-shot tasks, the compressed and the distilled checkpoint, also in the report."""

import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
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
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.compressed.checkpoint import load, unpack_checkpoint
from layerwise.tasks.lm_eval_tasks.answers import DOCUMENTS_FILE
from layerwise.tasks.lm_eval_tasks.comparison import without_distilled
from layerwise.tasks.report import PAGE_FILE
from layerwise.tasks.results.distillation import read_distillation
from layerwise.tasks.results.garbage import keys_of_results
from tests.lm_task_files import WORDS, give_words, some_documents, write_generated_task, write_task
from tests.lm_task_files import answered as answered_by


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


def first_search(runtime: Runtime) -> Artifact:
    """Return the search of ``done``: tests add other ones to its store."""
    found = [each for each in ArtifactStore(runtime.store).artifacts() if each.recipe["name"] == "search"]
    return min(found, key=lambda each: each.made["at"])


@pytest.fixture(scope="module")
def distilled(done) -> tuple[Artifact, str]:
    """Distilled model of the first search, trained on more windows than the search was calibrated on; what was printed."""
    options = ["--steps", "4", "--windows", "20", "--held-out", "2", "--batch", "2", "--evaluate-every", "2"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as shown:
        command = ["layerwise", "distill", done[1].store, first_search(done[1]).key, *options]
        patch.setattr(sys, "argv", command)
        cli.main()
    return newest(done[1], "distill"), shown.getvalue()


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
    with pytest.raises(
        ValueError, match="has no distilled model. Make one with `layerwise distill STORE search/"
    ):
        compress(Compress(distilled=True), runtime)
    assert names_in(runtime) == before
    compress(Compress(), runtime)
    added = set(names_in(runtime)) - set(before)
    assert [key for key in added if key.startswith("export/")]


def test_the_distilled_checkpoint_is_shown_next_to_the_pruned_one(done, distilled, monkeypatch, capsys):
    store, (folder, shown) = ArtifactStore(done[1].store), distilled
    result = read_distillation(store, folder)
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
    monkeypatch.setattr(sys, "argv", ["layerwise", "show", done[1].store, first_search(done[1]).key])
    cli.main()
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last == [f"Pruned model: {done[0].pruned}", f"Distilled model: {store.location(folder)}"]


def test_the_distilled_model_answers_the_questions_of_the_others(done, distilled, tasks, answered, tmp_path):
    store, (folder, _) = ArtifactStore(done[1].store), distilled
    comparison = zero_shot(ZeroShot(search=first_search(done[1]).key, tasks=tasks, documents=12), done[1])
    direct = ArtifactStore(str(tmp_path / "direct"))
    expected = answered_by(direct, Path(store.location(folder)), tasks, documents=12)
    table = newest(done[1], "zero_shot_table")
    assert without_distilled(comparison) == without_distilled(answered)
    for row in (*comparison.rows, comparison.average):
        assert row.distilled_to_best.difference == pytest.approx(100 * (row.distilled.value - row.best.value))
        assert row.distilled_to_dense.difference == pytest.approx(
            100 * (row.distilled.value - row.dense.value)
        )
    for row in comparison.rows:
        answers = store.get(table.recipe["inputs"][f"distilled {row.task}"])
        assert store.read(answers, DOCUMENTS_FILE) == direct.read(expected[row.task], DOCUMENTS_FILE)
        assert answers.key != table.recipe["inputs"][f"best {row.task}"]
        assert row.distilled.value == expected[row.task].facts["acc"]
    average, page = comparison.average, store.read(newest(done[1], "report"), PAGE_FILE).decode()
    assert "<th>distilled minus best, points</th>" in page
    assert (
        f"{100 * average.distilled.value:.1f} % ({100 * average.best.value:.1f} % before the distillation)"
        in page
    )


def test_the_compressed_distilled_checkpoint_is_the_distilled_one_bit_for_bit(
    done, distilled, tmp_path, monkeypatch, capsys
):
    store, (folder, _) = ArtifactStore(done[1].store), distilled
    options = ["--store", done[1].store, "--search", first_search(done[1]).key, "--distilled"]
    monkeypatch.setattr(sys, "argv", ["layerwise", "compress", *options])
    cli.main()
    packed = newest(done[1], "compress")
    assert store.location(packed) in capsys.readouterr().out
    unpack_checkpoint(store.location(packed), tmp_path / "unpacked")
    names = {path.name for path in (tmp_path / "unpacked").iterdir()}
    assert names == {*folder.files} - {"README.md", "distillation.json"}
    index = "model.safetensors.index.json"  # equal, but not written in the same order
    for name in names - {index}:
        assert (tmp_path / "unpacked" / name).read_bytes() == store.read(folder, name), name
    card, result = store.read(packed, "README.md").decode(), read_distillation(store, folder)
    of_folder = store.read(folder, "README.md").decode()
    for section in ("Distillation", "Results"):
        assert section_of(card, section) == section_of(of_folder, section)
    assert f"| **this model** | test text | {result.test_windows} x 16 | {result.rows[2].test:.2f} |" in card
    assert "from layerwise.tasks.compressed.checkpoint import load" in card


def test_no_other_model_takes_the_place_of_a_damaged_distilled_one(done, distilled, tmp_path):
    runtime = Runtime(store=str(shutil.copytree(done[1].store, tmp_path / "store")))
    store, folder = ArtifactStore(runtime.store), distilled[0]
    damaged = Path(store.location(folder)) / "distillation.json"
    damaged.write_bytes(b"[" + damaged.read_bytes()[1:])
    before = names_in(runtime)
    with pytest.raises(
        ValueError, match=f"{folder.key} is damaged or deleted. Run `layerwise distill` again"
    ):
        compress(Compress(search=first_search(runtime).key, distilled=True), runtime)
    assert set(names_in(runtime)) == set(before) - {folder.key}


def section_of(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


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
    options = ["--search", first_search(done[1]).key, "--tasks", ",".join(tasks), "--documents", "12"]
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
    given = ["--store", done[1].store, "--search", first_search(done[1]).key]
    options = ["--tasks", ",".join(tasks), "--documents", "12"]
    for command in (["zero-shot", *given, *options], ["compress", *given]):
        monkeypatch.setattr(sys, "argv", ["layerwise", *command])
        cli.main()
    shown = capsys.readouterr().out
    accuracies, differences = shown.split("\nDifferences in percentage points")
    assert re.search(r"^task +documents +dense +(uniform +)?best +standard error", accuracies, re.MULTILINE)
    assert re.search(r"^task +to dense +", differences, re.MULTILINE)
    assert all(re.search(r"^average ", table, re.MULTILINE) for table in (accuracies, differences))
    assert "Compressed model:" in shown


def test_few_shot_accuracies_and_lengths_of_answers_are_shown_everywhere(
    done, distilled, tmp_path, capsys, monkeypatch
):
    store, first = ArtifactStore(done[1].store), first_search(done[1]).key
    task = write_generated_task(tmp_path, "writing", some_documents(10, 5))
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
    card, card_of_distilled = (
        store.read(compress(Compress(search=first, distilled=each), done[1]), "README.md").decode()
        for each in (False, True)
    )
    for text in (page, card, card_of_distilled):
        assert all(
            each in text for each in ("writing", "exact_match,first-word", "tokens, best", length, average)
        )
    assert "writing" in shown
    assert ["distilled to best" in text for text in (page, card, card_of_distilled)] == [True, False, True]
    assert "this model is the distilled one" in card_of_distilled
