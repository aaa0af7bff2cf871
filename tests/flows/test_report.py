"""Report of a small search: every number on the page comes from an artifact, and the page is self-contained."""

import hashlib
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerwise.flows.cli.parser import parse_command
from layerwise.flows.report import make_report
from layerwise.scoring.perplexity import format_perplexity
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.tasks.charts.drawing import svg_inside
from layerwise.tasks.pages.report_data import (
    CheckpointSizes,
    Extras,
    ReportData,
    ZeroShotAccuracies,
    report_data,
)
from layerwise.tasks.pages.report_page import report_page
from layerwise.tasks.report import figures_of, report
from layerwise.tasks.results.distillation import Distillation, DistilledRow
from layerwise.tasks.results.lane_scores import ERRORS_FILE, LINEARS_FILE
from layerwise.tasks.results.search_result import FinishedSearch, read_search

SECTIONS = ["models", "load", "perplexity", "sparsity", "errors", "linears", "stages", "repeat"]
EMPTY = {"meta", "path", "line", "rect", "stop", "circle"}  # elements without an end tag
EXTRAS = Extras(
    zero_shot=(ZeroShotAccuracies("arc_easy", 0.61, 0.32, 0.4, 0.015, 0.08, 0.0021),),
    sizes=CheckpointSizes(273_000_000, 272_000_000, 141_000_000),
)


class Page(HTMLParser):
    """Contents of a page; fails if its elements are not well nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.blocks: list[str] = []  # commands and code
        self.section = ""
        self.feed(html)
        self.close()
        assert self.open == []
        self.said = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag == "pre":
            self.blocks.append("")
        if tag == "table":
            self.tables.setdefault(self.section, []).append([])
        if tag == "tr":
            self.tables[self.section][-1].append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)
        if "pre" in self.open:
            self.blocks[-1] += data
        if {"td", "th"} & set(self.open):
            self.tables[self.section][-1][-1][-1] += data


@pytest.fixture(scope="module")
def store(finished) -> ArtifactStore:
    return ArtifactStore(finished[1].store)


@pytest.fixture(scope="module")
def artifact(finished, store) -> Artifact:
    """Artifact of the report that the search made."""
    (artifact,) = [each for each in store.artifacts() if each.key in finished[0].report]
    return artifact


@pytest.fixture(scope="module")
def found(store, artifact) -> FinishedSearch:
    return read_search(store, store.get(artifact.facts["search"]))


@pytest.fixture(scope="module")
def data(store, found) -> ReportData:
    return report_data(store, found, {}, "", Extras())


@pytest.fixture(scope="module")
def html(store, artifact) -> str:
    return store.read(artifact, "report.html").decode()


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def of_data(store: ArtifactStore, artifact: Artifact, name: str) -> list[dict]:
    return read_table(store, artifact, f"data/{name}.parquet").to_pylist()


def test_the_page_has_every_section_in_order(page):
    assert [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")] == SECTIONS


def test_the_page_loads_nothing_from_outside(page, html):
    assert not [
        each for each in page.attributes if each[1] in ("src", "href", "xlink:href", "action", "data")
    ]
    assert set(re.findall(r"https?://[^\s\"<]*", html)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    policies = [value for tag, name, value in page.attributes if (tag, name) == ("meta", "content")]
    assert any(value.startswith("default-src 'none'") for value in policies)


def test_identifiers_are_unique(page):
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_the_cost_on_unseen_text_the_verdict_and_a_summary_of_the_work_come_first(finished, page):
    result, _ = finished
    lead = page.said[: page.said.index("Dense, uniform, best")]
    cost = f"perplexity {result.test.dense:.2f} → {result.test.best:.2f} on unseen text"
    assert f"50 % removed: {cost}; uniform {result.test.uniform:.2f}. Chosen" in lead
    assert f"Chosen: {result.selection.verdict}." in lead
    row = result.selection.best_row
    lane = result.stages[f"lane beta {row.beta:g}"]
    linears = read_table(ArtifactStore(finished[1].store), lane, LINEARS_FILE)
    zeros, weights = (sum(linears[name].to_pylist()) for name in ("zeros", "weights"))
    assert f"wanda removed {zeros:,} of {weights:,} weights" in lead
    assert "from 21 linears in 3 decoder layers" in lead
    assert "3 plans were scored on 4 windows of 16 tokens" in lead


def test_dense_uniform_and_best_are_compared_with_the_numbers_of_the_artifacts(
    finished, store, artifact, page
):
    test, selection = finished[0].test, finished[0].selection
    header, tested, selected, *_ = page.tables["models"][0]
    assert header == ["", "dense", "uniform", "best"]
    assert tested[1:] == [format_perplexity(value) for value in (test.dense, test.uniform, test.best)]
    dense, uniform, best = selection.dense_perplexity, selection.rows[0], selection.best_row
    assert selected[1:] == [
        format_perplexity(value) for value in (dense, uniform.perplexity, best.perplexity)
    ]
    rows = of_data(store, artifact, "models")
    assert [row["test_perplexity"] for row in rows] == [test.dense, test.uniform, test.best]


def test_the_table_of_betas_is_that_of_the_selection(finished, store, artifact, page):
    rows, (header, *lines) = of_data(store, artifact, "betas"), page.tables["perplexity"][0]
    assert header[:2] == ["plan", "perplexity"]
    assert [line[:2] for line in lines] == [
        [row["plan"], format_perplexity(row["perplexity"])] for row in rows
    ]
    assert [row["perplexity"] for row in rows] == [row.perplexity for row in finished[0].selection.rows]


def test_sparsities_and_errors_by_layer_are_those_of_the_lanes(finished, store, artifact, page):
    rows, (header, *lines) = of_data(store, artifact, "sparsities"), page.tables["sparsity"][0]
    assert header == ["layer", "uniform", "beta 0.1", "beta 0.25"]
    assert [line[0] for line in lines] == ["0", "1", "2"]
    for row in rows:
        assert lines[row["layer"]][header.index(row["plan"])] == f"{row['sparsity']:.4f}"
    table = read_table(store, finished[0].stages["lane beta 0.1"], LINEARS_FILE).to_pylist()
    of_layer_1 = [row for row in table if row["layer"] == 1]
    (row,) = [row for row in rows if (row["plan"], row["layer"]) == ("beta 0.1", 1)]
    assert row["zeros"] == sum(linear["zeros"] for linear in of_layer_1)
    assert row["sparsity"] == row["zeros"] / sum(linear["weights"] for linear in of_layer_1)
    uniform = read_table(store, finished[0].stages["evaluate"], "uniform/layers.parquet").to_pylist()
    errors = [
        row["relative_error"] for row in of_data(store, artifact, "errors") if row["model"] == "uniform"
    ]
    assert errors == [row["error"] / row["dense_energy"] for row in uniform]
    assert [line[1] for line in page.tables["errors"][0][1:]] == [f"{error:.5f}" for error in errors]


def test_every_stage_and_every_artifact_is_named(finished, store, page):
    stages = [line[0] for line in page.tables["stages"][0][1:]]
    assert sorted(stages) == sorted(
        [
            "checkpoint",
            "calibration",
            "selection",
            "test",
            "capture",
            "allocate",
            "3 lanes",
            "select",
            "export",
            "evaluate",
        ]
    )
    assert all(line[2].endswith("MB") or line[2].endswith("GB") for line in page.tables["stages"][0][1:])
    lines = {line[0]: line[1:3] for line in page.tables["repeat"][-1][1:]}
    for role, artifact in finished[0].stages.items():
        assert lines[role] == [artifact.key, artifact.content]


def test_the_page_has_the_command_that_repeats_the_search(finished, page):
    assert "layerwise search --model=" in page.said
    assert finished[0].settings.model in page.said
    assert re.search(r"torch \d", page.said)


def test_figures_are_files_of_the_report(store, artifact):
    names = ["errors", "linears", "perplexity", "sparsity", "stages"]
    assert sorted(name for name in artifact.files if name.startswith("figures/")) == sorted(
        f"figures/{name}.{kind}" for name in names for kind in ("png", "svg")
    )
    for name in names:
        png = store.read(artifact, f"figures/{name}.png")
        assert png.startswith(b"\x89PNG")
        assert int.from_bytes(png[16:20]) > 800  # pixels wide


def test_missing_measurements_are_replaced_by_the_commands_that_make_them(page, found):
    assert "No zero-shot tasks were run." in page.said
    assert "The speed was not measured." in page.said
    commands = [shlex.split(block)[1:] for block in page.blocks if block.startswith("layerwise ")]
    assert [words[0] for words in commands] == ["zero-shot", "bench", "search"]
    parsed = [parse_command(words) for words in commands]
    assert (parsed[0].search, parsed[1].key) == (found.artifact.key, found.artifact.key)


def test_the_code_on_the_page_loads_the_exported_model(finished, page, store):
    (code,) = [block for block in page.blocks if "from_pretrained" in block]
    assert finished[0].pruned in code.replace("STORE", store.root)
    loaded: dict = {}
    exec(code.replace("STORE", store.root), loaded)
    exported = AutoModelForCausalLM.from_pretrained(finished[0].pruned).state_dict()
    assert all(torch.equal(weight, exported[name]) for name, weight in loaded["model"].state_dict().items())
    assert loaded["tokenizer"]("w0 w1").input_ids == [1, 2]


def test_a_distilled_model_is_the_headline_and_is_loaded(data):
    rows = (DistilledRow("pruned", 9.0, 9.0, 5), DistilledRow("distilled", 6.5, 6.5, 5))
    training = Distillation("text", 8, 2, 3, 16, 4, 4, 2, 128, 0.001, (), rows)
    folders = {**data.folders, "distilled model": "distill/0/1"}
    average = ZeroShotAccuracies("average", 0.61, 0.32, 0.4, 0.015, 0.08, 0.0021, 0.45, 0.05, 0.03)
    extras = replace(data.extras, zero_shot=(average,))
    changed = replace(data, distillation=training, folders=folders, extras=extras)
    page = Page(report_page(changed, {figure: "" for figure in figures_of(data)}))
    dense, best = (data.tables["models"][row]["test_perplexity"] for row in (0, 2))
    cost = f"perplexity {dense:.2f} → 6.50 ({best:.2f} before the distillation)"
    assert f"50 % removed, distilled: {cost} on unseen text" in page.said
    assert "61.0 % → 45.0 % (40.0 % before the distillation); uniform 32.0 %." in page.said
    assert page.tables["models"][1][1][-3:] == ["45.0 %", "+5.0", "0.03"]
    assert "--distilled writes those of the distilled model without the zeros" in page.said
    assert any('folder = "STORE/distill/0/1"' in block for block in page.blocks)
    untested = replace(
        average, distilled=None, distilled_difference=None, distilled_p=None
    )  # tested before the distillation
    models = [row | {"test_kl": 0.7} for row in data.tables["models"]]
    changed = replace(
        changed, tables={**data.tables, "models": models}, extras=replace(extras, zero_shot=(untested,))
    )
    page = Page(report_page(changed, {figure: "" for figure in figures_of(data)}))
    assert "61.0 % → 40.0 % before the distillation; uniform 32.0 %." in page.said
    assert "from the dense model: 0.7 nats per token before the distillation; uniform 0.7." in page.said


def test_a_search_without_export_says_how_to_write_the_model(data):
    page = Page(report_page(replace(data, folders={}), {figure: "" for figure in figures_of(data)}))
    assert "The search did not write the pruned model." in page.said
    assert not [block for block in page.blocks if "from_pretrained" in block]


def test_every_text_has_its_range_of_tokens(page):
    header, *rows = page.tables["repeat"][0]
    assert header[:4] == ["text", "corpus", "drawn from tokens", "of"]
    ranges = {row[0]: row[2:6] for row in rows}
    assert ranges == {
        "calibration": ["0 to 1,000", "2,000", "6", "16"],
        "selection": ["1,000 to 1,500", "2,000", "4", "16"],
        "test": ["1,500 to 2,000", "2,000", "3", "16"],
    }


def test_settings_are_folded_and_both_layouts_of_every_figure_are_there(page, html):
    folded = re.findall(r"<summary>(.*?)</summary>", html)
    assert folded[-3:] == ["Settings", "Model and versions", "Artifacts"]
    assert not [each for each in page.attributes if each[:2] == ("details", "open")]
    layouts = [value for tag, name, value in page.attributes if (tag, name) == ("div", "class")]
    assert layouts.count("wide") == layouts.count("narrow") == 5
    assert all("<svg" in part for part in re.findall(r'<div class="(?:wide|narrow)">(.*?)</div>', html, re.S))


def test_the_page_names_the_texts_and_dtypes_of_the_perplexities(page, workshop):
    digest = hashlib.sha256(workshop.text.read_bytes()).hexdigest()[:12]
    of_test = "3 windows of 16 tokens from tokens 1,500 to 2,000 of 2,000 (no BOS before the first)"
    dtypes = "model in float32, losses in float32."
    assert f"Test text: {workshop.text}: {of_test}, SHA-256 {digest}…; {dtypes}" in page.said
    assert f"Selection text: {workshop.text}: 4 windows of 16 tokens from tokens 1,000 to 1,500" in page.said


def test_measurements_made_after_the_search_are_on_the_page(store, found):
    made = report.fn(store, found.artifact, extras=EXTRAS, compared={"owl": found.artifact})
    page = Page(store.read(made, "report.html").decode())
    assert ["arc_easy", "61.0 %", "32.0 %", "40.0 %", "1.5 %", "+8.0", "0.0021"] in page.tables["models"][1]
    assert ["compressed, without zeros", "", "", "141 MB"] in page.tables["models"][0]
    best = found.selection.name(found.selection.best)
    assert f"owl, {best}" in page.tables["sparsity"][0][0]
    assert {"data/sizes.parquet", "data/zero_shot.parquet"} <= set(made.files)
    assert "distilled" not in read_table(store, made, "data/zero_shot.parquet").column_names
    assert made.key != report.fn(store, found.artifact).key


def test_names_with_markup_are_shown_as_text(data):
    name = "<script>alert(1)</script> & \"x\" 'y' {{ 1 }}"
    hostile = replace(
        data,
        title=name,
        source=name,
        verdict=name,
        settings={**data.settings, "model": name},
        command=name,
        versions={name: name},
        checkpoint={"source": name},
    )
    page = Page(report_page(hostile, {figure: "<svg></svg>" for figure in figures_of(data)}))
    # Title, heading, verdict, what was done, setting, command, versions, model.
    assert page.said.count(name) == 9
    assert [value for tag, _, value in page.attributes if tag == "script"] == []


def test_a_name_in_a_table_or_figure_adds_no_element_to_the_page(data):
    def elements(name):
        linears = [{**row, "linear": f"{row['linear']}{name}"} for row in data.tables["linears"]]
        tasks = tuple(replace(row, task=name) for row in EXTRAS.zero_shot)
        tables = {**data.tables, "linears": linears}
        changed = replace(data, tables=tables, extras=replace(EXTRAS, zero_shot=tasks))
        figures = {figure: svg_inside(chart, figure) for figure, chart in figures_of(changed).items()}
        return [(tag, key) for tag, key, _ in Page(report_page(changed, figures)).attributes]

    assert elements("\"><script src='x'>'</title></svg>") == elements("plain")


def test_the_same_artifacts_give_the_same_bytes(store, artifact, tmp_path):
    shutil.copytree(store.root, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "report")
    again = ArtifactStore(str(tmp_path / "copy"))
    search = again.get(artifact.facts["search"])
    made = report.fn(again, search, artifact.recipe["settings"]["command"])
    assert again.built == {made.key}
    assert (made.key, made.content) == (artifact.key, artifact.content)


def test_the_report_of_a_search_is_found_and_copied(finished, found, tmp_path):
    result, runtime = finished
    assert make_report(runtime.store, found.artifact.key) == result.report
    page = tmp_path / "page.html"
    assert make_report(runtime.store, found.artifact.key[:20], page) == str(page)
    assert page.read_bytes() == Path(result.report).read_bytes()


def test_an_artifact_that_is_not_a_search_has_no_report(finished):
    result, runtime = finished
    with pytest.raises(ValueError, match="capture/.* is not the result of a search. Give the key"):
        make_report(runtime.store, result.stages["capture"].key)


def test_a_search_with_deleted_artifacts_has_no_report(store, found, tmp_path):
    shutil.copytree(store.root, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / found.stages["capture"].key)
    with pytest.raises(
        KeyError, match="is missing .*`layerwise gc --results-only` may have deleted it. Run the search again"
    ):
        make_report(str(tmp_path / "copy"), found.artifact.key)


def test_local_errors_of_layers_are_those_of_the_test(data, store, found):
    """The input of the first layer has no error yet, so its local error is its whole error over the same windows."""
    tested = found.stages["evaluate"]
    for model in ("uniform", "best"):
        rows = [row for row in data.tables["errors"] if row["model"] == model]
        parts = read_table(store, tested, f"{model}/{ERRORS_FILE}").to_pylist()
        assert [row["relative_local_error"] for row in rows] == [
            part["local"] / part["energy"] for part in parts
        ]
        assert [row["propagation_factor"] for row in rows] == [part["factor"] for part in parts]
        # All three test windows are used for the local errors.
        assert rows[0]["relative_local_error"] == pytest.approx(rows[0]["relative_error"], rel=1e-6)
