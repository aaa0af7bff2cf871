"""The theory as a flow, on a real Prefect server; and what it refuses."""

import os
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter
from pydantic import ValidationError

from layerwise.flows.report import make_report
from layerwise.flows.runtime import Runtime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from layerwise.flows.theory import Theory, theory
from layerwise.storage.artifact import Artifact
from layerwise.storage.formats.tables import read_table
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.pages.theory_section import sentences

LEAST = {"model": "models/demo", "sparsity": 0.5}


def small(workshop, **changes) -> dict:
    """The workshop's search without betas: the theory has plans of its own."""
    return workshop.parameters(**changes) | {"betas": None}


@pytest.fixture(scope="module")
def looked_at(workshop, prefect_backend, finished, tmp_path_factory):
    """A run in a store with a finished search of the same model and sparsity, and a newer one of another sparsity."""
    store = tmp_path_factory.mktemp("theory") / "store"
    shutil.copytree(finished[1].store, store)
    runtime = Runtime(store=str(store))
    search(workshop.settings(sparsity=0.4, betas=[0.1], export=False), runtime)
    state = theory(Theory(search=small(workshop)), runtime, return_state=True)
    return state, state.result(), runtime


def test_the_capture_of_a_search_serves_the_theory_too(looked_at, finished):
    _, result, runtime = looked_at
    after, before = (
        {each.key for each in ArtifactStore(url).artifacts() if each.recipe["name"] == "capture"}
        for url in (runtime.store, finished[1].store)
    )
    assert finished[0].stages["capture"].key in after <= before
    assert result.measured.recipe["name"] == "theory"


def report_of(runtime, sparsity) -> tuple[ArtifactStore, Artifact]:
    """The newest report of a search at this sparsity."""
    store = ArtifactStore(runtime.store)
    reports = [each for each in store.artifacts() if each.recipe["name"] == "report"]
    of_search = [each for each in reports if f"sparsity {sparsity}" in each.facts["title"]]
    return store, max(of_search, key=lambda each: each.made["at"])


def test_the_searchs_report_has_the_theory_as_a_section_with_all_numbers_beside_it(looked_at):
    _, result, runtime = looked_at
    store, report = report_of(runtime, 0.5)
    html = unescape(store.read(report, "report.html").decode())
    section = html[html.index('<section id="theory">') : html.index('<section id="stages">')]
    assert "Theorems of the paper" in section
    for sentence in sentences(result.findings).values():
        assert sentence in section
    assert section.count("<svg") == 3
    for name in ("rise", "factor", "orders"):
        assert {f"figures/{name}.svg", f"figures/{name}.png"} <= set(report.files)
    for name in ("layers", "plans"):
        table = read_table(store, report, f"data/theory_{name}.parquet")
        assert table.to_pylist() == read_table(store, result.measured, f"{name}.parquet").to_pylist()


def test_a_search_of_another_sparsity_does_not_get_it(looked_at):
    _, result, runtime = looked_at
    store, report = report_of(runtime, 0.4)
    make_report(runtime.store, report.facts["search"])
    store, report = report_of(runtime, 0.4)
    assert 'id="theory"' not in store.read(report, "report.html").decode()


def test_orders_and_levels_are_all_there(looked_at):
    _, result, _ = looked_at
    assert result.findings.levels == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    names = [outcome.order for outcome in result.findings.orders.outcomes]
    assert names[:2] == ["ascending", "descending"]
    assert len(names) == len(set(names)) > 2


def test_prefect_has_what_was_found_and_where_the_page_is(looked_at):
    state, result, _ = looked_at
    with get_client(sync_client=True) as client:
        run = ArtifactFilter(flow_run_id={"any_": [state.state_details.flow_run_id]})
        (artifact,) = [each for each in client.read_artifacts(artifact_filter=run) if each.key == "theory"]
        flow_run = client.read_flow_run(state.state_details.flow_run_id)
    assert flow_run.name == "model at 0.5, wanda: theory"
    for sentence in sentences(result.findings).values():
        assert sentence in artifact.data
    assert result.page in artifact.data


def test_a_second_run_finds_the_same_page_and_computes_nothing(looked_at, workshop):
    _, result, runtime = looked_at
    before = {each.key for each in ArtifactStore(runtime.store).artifacts()}
    again = theory(Theory(search=small(workshop)), runtime)
    assert (again.page, again.findings) == (result.page, result.findings)
    assert {each.key for each in ArtifactStore(runtime.store).artifacts()} == before


def layerwise_theory(workshop, server, store, *more) -> subprocess.CompletedProcess:
    """The command, in a process of its own without a terminal."""
    small = {name: value for name, value in workshop.parameters().items() if name != "betas"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    return subprocess.run(
        [sys.executable, "-m", "layerwise.flows.cli.main", "theory", *options, f"--store={store}", *more],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PREFECT_API_URL": server},
        capture_output=True,
        text=True,
    )


def test_the_command_prints_every_theorem_with_its_numbers_and_where_the_page_lies(
    looked_at, workshop, prefect_backend
):
    _, result, runtime = looked_at
    done = layerwise_theory(workshop, prefect_backend, runtime.store)
    assert done.returncode == 0, done.stderr
    for name, sentence in sentences(result.findings).items():
        assert f"{name}  {sentence}" in done.stdout
    assert f"Page: {result.page}" in done.stdout
    assert Path(result.page).read_text().startswith("<!doctype html>")


def test_the_command_refuses_a_beta_that_the_model_does_not_allow_in_one_line(
    workshop, prefect_backend, tmp_path
):
    done = layerwise_theory(workshop, prefect_backend, tmp_path / "store", "--beta=0.51")
    assert done.returncode == 1
    assert "layerwise: beta 0.51 is outside of the legal range" in done.stderr
    assert "Traceback" not in done.stderr


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
def test_settings_of_a_search_that_have_no_part_in_it_are_refused(changes, named):
    with pytest.raises(ValidationError, match=named):
        Theory.model_validate({"search": LEAST | changes})


@pytest.mark.parametrize("beta", [0, -0.1])
def test_a_beta_that_gives_no_order_is_refused(beta):
    with pytest.raises(ValidationError, match="beta"):
        Theory.model_validate({"search": LEAST, "beta": beta})


def test_a_beta_that_the_model_does_not_allow_is_refused_before_anything_is_computed(
    workshop, prefect_backend, tmp_path
):
    """Of three layers at sparsity 0.5 beta may be 0.5 at most."""
    store = tmp_path / "store"
    state = theory(Theory(search=small(workshop), beta=0.51), Runtime(store=str(store)), return_state=True)
    with pytest.raises(ValueError, match="beta 0.51 is outside of the legal range"):
        state.result()
    assert [*ArtifactStore(str(store)).artifacts()] == []


def test_other_processes_are_refused_as_all_plans_advance_together(workshop, prefect_backend, tmp_path):
    runtime = Runtime(store=str(tmp_path / "store"), fan_out="processes:2")
    state = theory(Theory(search=small(workshop)), runtime, return_state=True)
    with pytest.raises(ValueError, match="fan_out is processes:2, but all plans"):
        state.result()
    assert not (tmp_path / "store").exists()


def test_the_page_shows_the_settings_that_were_used_and_no_others():
    settings = Theory(search=Search(**LEAST, seed=3), beta=0.01)
    assert settings.shown["seed"] == 3
    assert settings.shown["beta"] == 0.01
    assert not {"betas", "strategy", "allocator", "export"} & set(settings.shown)
