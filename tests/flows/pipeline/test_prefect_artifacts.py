"""Prefect's pages on a finished search."""

import base64
import json
import re
import time
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.runtime import flow_run
from transformers import AutoModelForCausalLM

from layerwise.flows.pipeline.prefect_artifacts import how_to_load, publish_to_prefect, search_report
from layerwise.flows.pipeline.result import work_sentence
from layerwise.flows.search import search
from layerwise.scoring.perplexity import PairedDifference
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.evaluation import TestResult
from layerwise.tasks.results.summary import sentence_on_test, table_rows

ENOUGH = 60  # seconds in which Prefect's server has noted the runs of all tasks; one, mostly


def code_of(markdown: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)
    return code


@pytest.fixture
def page(finished):
    """Artifact of the search's report."""
    result, runtime = finished
    (page,) = [each for each in ArtifactStore(runtime.store).artifacts() if each.key in result.report]
    return page


@pytest.fixture
def report(finished, page):
    result, runtime = finished
    return search_report(ArtifactStore(runtime.store), result, page)


def test_the_report_has_the_verdict_and_compares_the_models(finished, report):
    result, _ = finished
    best = result.selection.best_row
    assert report.startswith("# model at 0.5, wanda\n")
    assert f"**{result.selection.verdict}.**" in report
    assert f"| **best** | {best.beta} | {best.perplexity:.2f} | {result.test.best:.2f} |" in report
    assert f"| dense | | {result.selection.dense_perplexity:.2f} | {result.test.dense:.2f} |" in report


def test_the_report_names_every_artifact_and_whether_it_was_built(finished, report):
    result, runtime = finished
    for role, artifact in result.stages.items():
        assert f"| {role} | `{artifact.key}` | built now |" in report
    assert result.pruned in report
    assert result.report in report
    assert f"`layerwise show {runtime.store}`" in report


def test_the_report_of_a_repeated_search_says_that_everything_was_reused(finished, page):
    result, runtime = finished
    again = search_report(ArtifactStore(runtime.store), replace(result, built=()), page)
    assert "Everything was in the store already" in again
    assert "built now" not in again


def test_the_report_contains_both_figures(report):
    figures = re.findall(r"!\[.*\]\(data:image/svg\+xml;base64,(.*)\)", report)
    drawn = [ElementTree.fromstring(base64.b64decode(figure)) for figure in figures]
    assert [figure.tag for figure in drawn] == ["{http://www.w3.org/2000/svg}svg"] * 2


@pytest.mark.parametrize("fresh_store_url", ["local", "memory", "s3"], indirect=True)
def test_the_code_that_loads_the_model_runs(finished, fresh_store_url, tmp_path, monkeypatch):
    result, _ = finished
    fs, folder = open_filesystem(f"{fresh_store_url}/export/key")
    fs.put(f"{result.pruned}/", f"{folder}/", recursive=True)
    place = folder if fresh_store_url.startswith("/") else str(fs.unstrip_protocol(folder))
    monkeypatch.chdir(tmp_path)
    made: dict[str, torch.nn.Module] = {}
    exec(code_of(how_to_load(place)), made)
    expected = AutoModelForCausalLM.from_pretrained(result.pruned).state_dict()
    for name, tensor in made["model"].state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_prefect_gets_table_report_paths_and_a_log_line(finished, page, caplog):
    result, runtime = finished

    @flow(persist_result=False)
    def publishing() -> str:
        publish_to_prefect(ArtifactStore(runtime.store), result, page)
        return flow_run.id

    with caplog.at_level("INFO", "prefect.flow_runs"):
        run = publishing()
    assert f"{result.selection.verdict}. {work_sentence(result)}" in caplog.messages
    with get_client(sync_client=True) as client:
        ours = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id={"any_": [run]}))
    artifacts = {artifact.key: artifact for artifact in ours}
    assert {key: artifact.type for key, artifact in artifacts.items()} == {
        "search-result": "table",
        "search-report": "markdown",
        "report-page": "markdown",
        "pruned-model": "markdown",
    }
    assert json.loads(artifacts["search-result"].data) == table_rows(result.selection)
    assert result.pruned in artifacts["pruned-model"].data
    assert result.report in artifacts["report-page"].data
    for artifact in (artifacts["search-result"], artifacts["search-report"]):
        assert artifact.description == f"model at 0.5: {result.selection.verdict}"


def test_task_runs_are_named_by_model_sparsity_and_beta(finished, workshop, recording_server):
    settings, runtime = workshop.settings(), finished[1]
    state = search(settings, runtime, return_state=True)
    best = state.result().selection.best_row.beta
    expected = {
        "import_checkpoint model",
        *(f"sample_tokens model: {role}" for role in ("calibration", "selection", "test")),
        "allocate at 0.5, 3 layers",
        "capture model",
        "branch model at 0.5: beta 0, 0.1, 0.25",
        "select among beta 0, 0.1, 0.25",
        f"export model at 0.5, beta {best:g}",
        f"evaluate model at 0.5, beta {best:g}",
    }
    deadline, names = time.monotonic() + ENOUGH, set()
    with get_client(sync_client=True) as client:
        ours = FlowRunFilter(id={"any_": [state.state_details.flow_run_id]})
        while not expected <= names and time.monotonic() < deadline:
            names = {run.name for run in client.read_task_runs(flow_run_filter=ours)}
            time.sleep(0.1)
    assert expected <= names


def test_a_huge_perplexity_is_printed_with_few_digits():
    test = TestResult(3, 11.0, 1e304, 20.0, PairedDifference(-500.0, -2.0, 3))
    assert sentence_on_test(test) == (
        "On the test text, 3 windows: dense 11.00, uniform 1.0e+304, best 20.00 (100.0 % below uniform, t = -2.0)."
    )


def test_a_best_plan_that_is_worse_on_the_test_text_is_above_uniform():
    test = TestResult(4, 14.18, 25.0, 26.0, PairedDifference(0.04, 0.5, 4))
    assert sentence_on_test(test).endswith("best 26.00 (4.0 % above uniform, t = 0.5).")
