"""Theory flow on a real Prefect server, and the settings that it refuses."""

import os
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.exceptions import ParameterTypeError
from pydantic import ValidationError

from layerwise.flows.report import make_report
from layerwise.flows.runtime import Runtime, SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from layerwise.flows.theory import Theory, theory
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.tasks.pages.theory_section import sentences

LEAST = {"model": "models/demo", "sparsity": 0.5}


def small(workshop, **changes) -> dict:
    """Return parameters of the small search without betas, as the theory has its own plans."""
    return workshop.parameters(**changes) | {"betas": None}


@pytest.fixture(scope="module")
def measured_run(workshop, prefect_backend, finished, tmp_path_factory):
    """A run in a store with a finished search of the same model and sparsity, and a newer one of another sparsity.

    Returns:
        The state, the result and the runtime of the run.
    """
    store = tmp_path_factory.mktemp("theory") / "store"
    shutil.copytree(finished[1].store, store)
    runtime = Runtime(store=str(store))
    search(workshop.settings(sparsity=0.4, betas=[0.1], export=False), runtime)
    state = theory(Theory(search=small(workshop)), runtime, return_state=True)
    return state, state.result(), runtime


def test_the_theory_reuses_the_capture_of_a_search(measured_run, finished):
    _, result, runtime = measured_run
    after, before = (
        {each.key for each in ArtifactStore(url).artifacts() if each.recipe["name"] == "capture"}
        for url in (runtime.store, finished[1].store)
    )
    assert finished[0].stages["capture"].key in after <= before
    assert result.measured.recipe["name"] == "theory"


def report_of(runtime, sparsity) -> tuple[ArtifactStore, Artifact]:
    """Return the store and the newest report of a search at this sparsity."""
    store = ArtifactStore(runtime.store)
    reports = [each for each in store.artifacts() if each.recipe["name"] == "report"]
    of_search = [each for each in reports if f"sparsity {sparsity}" in each.facts["title"]]
    return store, max(of_search, key=lambda each: each.made["at"])


def test_the_report_of_the_search_has_a_section_on_the_theory_and_its_data(measured_run):
    _, result, runtime = measured_run
    store, report = report_of(runtime, 0.5)
    html = unescape(store.read(report, "report.html").decode())
    section = html[html.index('<section id="theory">') : html.index('<section id="stages">')]
    assert "Theorems of the paper" in section
    for sentence in sentences(result.findings).values():
        assert sentence in section
    assert section.count("<svg") == 6  # two layouts of each figure
    for name in ("rise", "factor", "orders"):
        assert {f"figures/{name}.svg", f"figures/{name}.png"} <= set(report.files)
    for name in ("layers", "plans"):
        table = read_table(store, report, f"data/theory_{name}.parquet")
        assert table.to_pylist() == read_table(store, result.measured, f"{name}.parquet").to_pylist()


def test_the_report_of_a_search_at_another_sparsity_has_no_theory(measured_run):
    _, result, runtime = measured_run
    store, report = report_of(runtime, 0.4)
    make_report(runtime.store, report.facts["search"])
    store, report = report_of(runtime, 0.4)
    assert 'id="theory"' not in store.read(report, "report.html").decode()


def test_findings_have_all_orders_and_levels(measured_run):
    _, result, _ = measured_run
    assert result.findings.levels == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    names = [outcome.order for outcome in result.findings.orders.outcomes]
    assert names[:2] == ["ascending", "descending"]
    assert len(names) == len(set(names)) > 2


def test_prefect_has_the_findings_and_the_location_of_the_page(measured_run):
    state, result, _ = measured_run
    with get_client(sync_client=True) as client:
        run = ArtifactFilter(flow_run_id={"any_": [state.state_details.flow_run_id]})
        (artifact,) = [each for each in client.read_artifacts(artifact_filter=run) if each.key == "theory"]
        flow_run = client.read_flow_run(state.state_details.flow_run_id)
    assert flow_run.name == "model at 0.5, wanda: theory"
    for sentence in sentences(result.findings).values():
        assert sentence in artifact.data
    assert result.page in artifact.data


def test_a_second_run_has_the_same_page_and_computes_nothing(measured_run, workshop):
    _, result, runtime = measured_run
    before = {each.key for each in ArtifactStore(runtime.store).artifacts()}
    again = theory(Theory(search=small(workshop)), runtime)
    assert (again.page, again.findings) == (result.page, result.findings)
    assert {each.key for each in ArtifactStore(runtime.store).artifacts()} == before


def layerwise_theory(workshop, server, store) -> subprocess.CompletedProcess:
    """Run the command in another process, without a terminal."""
    small = {name: value for name, value in workshop.parameters().items() if name != "betas"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    return subprocess.run(
        [sys.executable, "-m", "layerwise", "theory", *options, f"--store={store}"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PREFECT_API_URL": server},
        capture_output=True,
        text=True,
    )


def test_the_command_prints_every_theorem_with_its_numbers_and_the_location_of_the_page(
    measured_run, workshop, prefect_backend
):
    _, result, runtime = measured_run
    done = layerwise_theory(workshop, prefect_backend, runtime.store)
    assert done.returncode == 0, done.stderr
    for name, sentence in sentences(result.findings).items():
        assert f"{name}  {sentence}" in done.stdout
    assert f"Page: {result.page}" in done.stdout
    assert Path(result.page).read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"pattern": "2:4"}, "search.pattern is 2:4"),
        ({"allocator": "owl"}, "search.allocator is owl"),
        ({"calibration_mode": "sequential"}, "search.calibration_mode is sequential"),
        ({"betas": [0.01]}, "search.betas is"),
        ({"strategy": "race"}, "search.strategy is race"),
        ({"offsets": [0.1]}, "search.offsets is"),
    ],
)
def test_settings_that_the_theory_does_not_use_are_refused(changes, named):
    with pytest.raises(ValidationError, match=named):
        Theory.model_validate({"search": LEAST | changes})


@pytest.mark.parametrize("beta", [0, -0.1])
def test_a_beta_that_is_not_positive_is_refused(beta):
    with pytest.raises(ValidationError, match="beta"):
        Theory.model_validate({"search": LEAST, "beta": beta})


def test_a_beta_that_the_model_does_not_allow_is_refused_before_any_work(workshop, prefect_backend, tmp_path):
    """With three layers at sparsity 0.5, the largest legal beta is 0.5."""
    store = tmp_path / "store"
    state = theory(Theory(search=small(workshop), beta=0.51), Runtime(store=str(store)), return_state=True)
    with pytest.raises(ValueError, match="beta 0.51 is outside the legal range"):
        state.result()
    assert [*ArtifactStore(str(store)).artifacts()] == []


def test_fan_out_is_refused_as_all_plans_advance_together(workshop, prefect_backend, tmp_path):
    runtime = SearchRuntime(store=str(tmp_path / "store"), fan_out="processes:2")
    with pytest.raises(
        ParameterTypeError, match="fan_out is processes:2, which is not a setting of this flow"
    ):
        theory(Theory(search=small(workshop)), runtime)
    assert not (tmp_path / "store").exists()


def test_the_page_shows_only_the_settings_that_were_used():
    settings = Theory(search=Search(**LEAST, seed=3), beta=0.01)
    assert settings.shown["seed"] == 3
    assert settings.shown["beta"] == 0.01
    assert not {"betas", "strategy", "allocator", "export"} & set(settings.shown)
