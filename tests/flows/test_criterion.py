"""Search by the criterion kl: divergences against torch on transformers' logits, the same in every kind of search."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

from layerwise.flows.cli.show import show_key
from layerwise.flows.fan_out.part_flows import capture
from layerwise.flows.pipeline.comparison_tables import Compared, markdown_of, rows_of
from layerwise.flows.pipeline.lookup import look_up
from layerwise.flows.pipeline.prefect_artifacts import search_report
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.tasks.results.roles import lane_role
from layerwise.tasks.texts.token_windows import read_input_ids


@pytest.fixture(scope="module")
def runtime(prefect_backend, tmp_path_factory):
    return SearchRuntime(store=str(tmp_path_factory.mktemp("criterion") / "store"))


@pytest.fixture(scope="module")
def by_kl(workshop, runtime):
    return search(workshop.settings(criterion="kl"), runtime)


def divergences(workshop, result, role):
    """Divergences of the exported model by window, by torch."""
    store = ArtifactStore(result.pruned.partition("/export/")[0])
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(place).eval() for place in (workshop.model, result.pruned)
    )
    with torch.no_grad():
        logits = [
            model(read_input_ids(store, result.stages[role])).logits[:, :-1] for model in (pruned, dense)
        ]
    p, p_dense = (log_softmax(each.double(), dim=-1) for each in logits)
    return kl_div(p, p_dense, reduction="none", log_target=True).sum(-1).mean(-1).tolist()


def test_the_divergence_is_that_of_the_exported_model_from_the_dense_one(workshop, runtime, by_kl):
    best = by_kl.selection.best_row
    lane = by_kl.stages[lane_role(best.beta, best.offset)]
    expected = divergences(workshop, by_kl, "selection")
    table = read_table(ArtifactStore(runtime.store), lane, "losses.parquet")
    assert table["kl"].to_pylist() == pytest.approx(expected, rel=1e-4)
    assert best.kl == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    tested = divergences(workshop, by_kl, "test")
    assert by_kl.test.kl.best == pytest.approx(sum(tested) / len(tested), rel=1e-4)


def test_the_plan_with_the_smallest_divergence_is_chosen_and_the_losses_are_those_of_other_searches(
    workshop, by_kl, finished
):
    rows = by_kl.selection.rows
    assert by_kl.selection.best_row.kl == min(row.kl for row in rows)
    assert [row.loss for row in rows] == [row.loss for row in finished[0].selection.rows]
    assert all(
        row.above_best.mean == pytest.approx(row.kl - by_kl.selection.best_row.kl)
        for row in rows
        if row.above_best
    )
    assert "KL divergence" in by_kl.selection.verdict


def test_the_dense_states_are_the_same_from_the_capture_and_from_a_pass_of_their_own(
    workshop, by_kl, untouched_store
):
    later = search(workshop.settings(criterion="kl"), SearchRuntime(store=str(untouched_store)))
    assert "capture" not in later.built
    assert "dense states" in later.built
    assert later.selection == by_kl.selection
    assert later.stages["dense states"].content == by_kl.stages["dense states"].content


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "race", "selection_windows": 24},
        {"calibration_mode": "sequential", "strategy": "evolutionary", "trials": 5},
        {"recover": "refit", "export": True},
    ],
    ids=["race", "sequential, evolutionary", "recovery"],
)
def test_every_kind_of_search_compares_divergences(workshop, runtime, changes):
    result = search(workshop.settings(criterion="kl", **{"export": False, **changes}), runtime)
    rows = result.selection.rows
    whole = max(row.windows for row in rows)
    assert result.selection.best_row.kl == min(row.kl for row in rows if row.windows == whole)
    store = ArtifactStore(runtime.store)
    for row in (row for row in rows if row.windows == whole):
        table = read_table(store, result.stages[lane_role(row.beta, row.offset)], "losses.parquet")
        assert row.kl == pytest.approx(sum(table["kl"].to_pylist()) / whole)
    if result.pruned is not None:
        card = (Path(result.pruned) / "README.md").read_text()
        assert f"| {result.test.best:.2f} | {result.test.kl.best:.4g} |" in card


def test_the_part_that_captures_also_keeps_the_dense_states_for_other_processes(
    workshop, by_kl, tmp_path, prefect_backend
):
    part = SearchRuntime(store=str(tmp_path / "store"))
    capture(workshop.settings(criterion="kl"), part)
    found = look_up(ArtifactStore(part.store), workshop.settings(criterion="kl"))
    assert found.stages["dense states"].content == by_kl.stages["dense states"].content
    assert found.next_lanes.are_known


def test_the_figure_is_labelled_wherever_it_is_shown(runtime, by_kl, capsys):
    store = ArtifactStore(runtime.store)
    show_key(runtime.store, by_kl.artifact.key)
    (page,) = [each for each in store.artifacts() if each.key in by_kl.report]
    shown = {
        "terminal": capsys.readouterr().out,
        "model card": (Path(by_kl.pruned) / "README.md").read_text(),
        "report": Path(by_kl.report).read_text(),
        "Prefect": search_report(store, by_kl, page),
        "comparison": markdown_of(rows_of([Compared(by_kl, "atp", (1.0, 1.0, 1.0), 1.0)])),
    }
    for text in shown.values():
        assert "KL divergence" in text
        for row in (by_kl.selection.rows[0], by_kl.selection.best_row):
            assert f"{row.kl:.4g}" in text
    document = json.loads(store.read(by_kl.artifact, "result.json"))
    assert document["settings"]["criterion"] == "kl"
    assert document["test"]["kl"]["best"] == by_kl.test.kl.best
