"""The tables of the ATP paper: published settings, published numbers, and a run next to them."""

import json
import random
import shutil

import pytest
from pydantic import ValidationError

from layerwise.flows.cli.flow_commands import comparison_of
from layerwise.flows.cli.parser import parse_command
from layerwise.flows.compare import Compare, compare
from layerwise.flows.pipeline.comparison_tables import rows_of
from layerwise.flows.presets.atp_paper import find_published
from layerwise.flows.runtime import Runtime
from layerwise.storage.store import ArtifactStore
from tests.lm_task_files import WORDS, give_words, some_documents, write_task

BASELINES = ["atp", "owl", "dsa", "alpha_pruning"]
ZERO_SHOT = {"boolq", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "openbookqa", "piqa"}
# Sparsities, pruners, allocations and tasks of the paper, as far as they are stated.
PUBLISHED = {
    "1": ([0.7], ["wanda", "sparsegpt"], BASELINES, ZERO_SHOT),
    "2": ([0.7], ["wanda", "sparsegpt"], BASELINES, set()),
    "3": ([0.5, 0.6, 0.7, 0.8], ["wanda"], BASELINES, set()),
    "4": ([0.7], ["wanda"], BASELINES, ZERO_SHOT),
    "5": ([0.7], ["wanda"], [f"atp step {step}" for step in (0.001, 0.002, 0.004, 0.008)], set()),
    "6": ([0.7], ["wanda"], ["atp", "atp+bayesian"], set()),
    "9": ([0.4, 0.6], ["wanda"], BASELINES, {"gsm8k", "mmlu"}),
    "14": (
        [0.7],
        ["wanda"],
        ["atp", *(f"{each} by linear" for each in ("global", "er", "er_plus", "lamp"))],
        set(),
    ),
    "15": ([0.7], ["dsnot", "alps"], ["atp"], set()),
}


def settings_of(*options: str) -> Compare:
    return comparison_of(parse_command(["compare", "--model=demo", "--store=unused", *options]))


@pytest.mark.parametrize("table", PUBLISHED)
def test_a_table_has_the_published_settings(table):
    sparsities, pruners, allocations, tasks = PUBLISHED[table]
    settings = settings_of("--preset=atp-paper", f"--table={table}")
    expected = [(share, pruner, title) for share in sparsities for pruner in pruners for title in allocations]
    assert [
        (each.search.sparsity, each.search.pruner.method, each.allocator) for each in settings.named_searches
    ] == expected
    assert set(settings.tasks) == tasks
    for search in settings.searches:
        assert (search.calibration, search.calibration_windows, search.seqlen) == ("c4", 128, 2048)
        # Validation split for the selection, all of it, and the whole test split at the end.
        assert (search.selection, search.selection_windows, search.test) == ("wikitext2", None, None)
        assert search.test_windows is None
    first = settings.searches[0]
    assert first.strategy == "grid"
    assert first.allocation.step == (0.001 if table == "5" else 0.002)


def test_a_form_with_the_preset_gets_the_same_settings_as_the_command_line():
    form = {"preset": "atp-paper", "table": "15", "search": {"model": "demo"}}
    assert Compare.model_validate(form) == settings_of("--preset=atp-paper", "--table=15")
    assert (
        settings_of("--preset=atp-paper").searches == settings_of("--preset=atp-paper", "--table=3").searches
    )


def test_explicit_options_override_the_preset():
    options = [
        "--sparsity=0.6",
        "--pruner=magnitude",
        "--allocators=lamp",
        "--seqlen=64",
        "--selection-windows=8",
        "--offsets=",
    ]
    settings = settings_of("--preset=atp-paper", "--table=1", *options, "--tasks=rte")
    (search,) = settings.searches
    assert (search.sparsity, search.pruner.method, search.allocator.method) == (0.6, "magnitude", "lamp")
    assert (search.seqlen, search.selection_windows, settings.tasks) == (64, 8, ("rte",))
    assert (search.calibration, search.calibration_windows) == ("c4", 128)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--preset=atp-paper", "--table=7"], "table is '7'; the preset atp-paper has the tables 1, 2, 3"),
        (["--preset=atp"], "preset is 'atp'; the only preset is atp-paper"),
        (["--table=6", "--sparsity=0.5"], "table is 6, but there is no preset"),
        (
            ["--preset=atp-paper", "--table=5", "--beta-step=0.01"],
            "beta_step is given, but the allocations of Table 5",
        ),
    ],
)
def test_unknown_presets_and_tables_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        settings_of(*options)
    with pytest.raises(ValidationError, match="the only preset is atp-paper"):
        Compare.model_validate({"preset": "owl", "search": {"model": "demo", "sparsity": 0.5}})


def test_published_numbers_are_found_by_model_and_agree_with_the_differences_in_the_abstract():
    def perplexity(allocator: str) -> float:
        number = find_published("meta-llama/Llama-2-7b-hf", 0.7, "wanda", allocator)
        assert number is not None
        return number.perplexity

    assert perplexity("uniform") - perplexity("atp") == pytest.approx(52.10)
    assert perplexity("alpha_pruning") - perplexity("atp") == pytest.approx(6.71)
    assert (perplexity("atp"), perplexity("atp+bayesian")) == (22.16, 22.10)
    assert find_published("/models/llama-7b/", 0.7, "wanda", "uniform").accuracy == 37.45
    for unknown in (("demo", 0.7, "wanda", "atp"), ("Llama-2-7b-hf", 0.5, "wanda", "atp")):
        assert find_published(*unknown) is None


def test_a_run_of_a_table_has_the_tasks_and_the_published_numbers_in_its_tables(
    workshop, prefect_backend, tmp_path
):
    model = tmp_path / "Llama-2-7b-hf"  # its name alone makes it the published model
    shutil.copytree(workshop.model, model)
    give_words(model)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    task = write_task(tmp_path, "one", some_documents(8))
    places = {"model": str(model), "calibration": str(text), "selection": str(text)}
    search = workshop.settings(**places, sparsity=0.7, betas=(0.05,))
    settings = Compare(
        preset="atp-paper", table="6", search=search, allocators=("atp",), pruners=(), tasks=(task,)
    )
    runtime = Runtime(store=str(tmp_path / "store"))
    results = compare(settings, runtime)
    (row,) = rows_of(results)
    assert (row["published: uniform"], row["published: best"]) == (74.26, 22.16)
    assert row["published in"] == (
        "ATP paper, abstract and text; ATP paper, Table 6 (there with another calibration, calibration_windows, selection, "
        "selection_windows, seqlen, test_windows)"
    )
    assert "published %: best" not in row  # the paper's average is that of other tasks
    plans = results[0].result.selection.rows
    assert row["not uniform, on selection"] == pytest.approx(
        min(each.perplexity for each in plans[1:]), rel=1e-2
    )
    answered = results[0].accuracy
    assert row["accuracy %: best"] == round(100 * answered.best.value, 2)
    assert answered.documents == 8
    store = ArtifactStore(runtime.store)
    (table,) = (each for each in store.artifacts() if each.recipe["name"] == "compare")
    page = store.read(table, "comparison.md").decode()
    assert "ATP paper, Table 6: Bayesian search" in page
    assert "the paper's code chooses beta on the test split" in page
    assert json.loads(store.read(table, "comparison.json"))["searches"][0]["published: best"] == 22.16
