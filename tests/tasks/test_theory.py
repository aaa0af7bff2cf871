"""Theory: measurements on a small model agree with those of other stages; the page shows them."""

import json
import math
from html import unescape
from xml.etree import ElementTree

import pytest
import torch

from layerwise.pruners.magnitude import Magnitude
from layerwise.scoring.theorem_plans import theory_plans
from layerwise.storage.tables import read_table
from layerwise.tasks.models.streamed import layer_sizes_of
from layerwise.tasks.pages.theory_section import ranges, sentences
from layerwise.tasks.results.theory_findings import findings_of, read_tables, verdicts
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.theory import measure_theory, theory_page

BETA = 0.25


@pytest.fixture
def measured():
    """Measure the theory on a small run."""

    def measure(run, scored="selection", **execution):
        sizes = layer_sizes_of(run.pruning.prunable(run.linears))
        plans, where = theory_plans(run.pruning.target, BETA, sizes), Execution(**execution)
        inputs = run.inputs(scored)
        return measure_theory.fn(run.store, inputs, plans, run.linears, run.pruning, where)

    return measure


def of_plan(rows, order, target=0.5):
    return [row for row in rows if (row["order"], row["target"]) == (order, target)]


def test_the_errors_agree_with_an_evaluation_on_the_same_windows(small_run, measured):
    run = small_run()
    layers, plans = read_tables(run.store, measured(run, "test"))
    evaluated = run.evaluate(0.0, BETA)
    for order, lane in (("uniform", "uniform"), ("ascending", "best")):
        rows = of_plan(layers, order)
        errors = read_table(run.store, evaluated, f"{lane}/errors.parquet").to_pylist()
        for name in ("local", "arriving", "propagated", "accumulated", "energy", "factor"):
            assert [row[name] for row in rows] == [row[name] for row in errors]
        losses = read_table(run.store, evaluated, f"{lane}/losses.parquet")["loss"].to_pylist()
        assert of_plan(plans, order)[0]["losses"] == losses


def test_the_error_that_arrives_at_a_layer_is_that_of_the_layer_before(small_run, measured):
    run = small_run()
    layers, plans = read_tables(run.store, measured(run))
    assert len(layers) == 3 * len(plans)
    for plan in plans:
        rows = of_plan(layers, plan["order"], plan["target"])
        assert rows[0]["arriving"] == 0
        for before, after in zip(rows, rows[1:], strict=False):
            assert after["arriving"] == pytest.approx(before["accumulated"], rel=1e-5)


def test_every_plan_removes_the_fraction_of_its_own_target(small_run, measured):
    """Uniform plans of other sparsities are pruned as in a search at that sparsity."""
    run = small_run()
    layers, _ = read_tables(run.store, measured(run))
    rows = of_plan(layers, "uniform", 0.2)
    (lane,) = small_run(run.folder, target=0.2).branch(0.0)
    plans = read_tables(run.store, measured(run))[1]
    assert of_plan(plans, "uniform", 0.2)[0]["losses"] == list(lane.losses)
    assert [row["sparsity"] for row in rows] == [0.2] * 3


def test_the_findings_cover_all_levels_and_all_layers_that_an_error_reaches(small_run, measured):
    run = small_run(pruner=Magnitude())
    found = findings_of(*read_tables(run.store, measured(run)))
    assert found.levels == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert (found.rise.layers, found.rise.steps) == (3, 24)
    assert found.target == 0.5
    assert [each.layer for each in found.propagation.layers] == [1, 2]


def test_the_findings_are_stored_as_json_and_as_facts(small_run, measured):
    run = small_run()
    artifact = measured(run)
    document = json.loads(run.store.read(artifact, "theory.json"))
    layers, plans = read_tables(run.store, artifact)
    found = findings_of(layers, plans)
    assert document["holds"] == verdicts(found)
    assert {artifact.facts[f"holds {name}"] for name in ("3.1", "3.2", "3.5")} <= {True, False}
    by_hand = {
        order: math.fsum(row["error"] for row in of_plan(layers, order))
        for order in ("ascending", "descending")
    }
    totals = {each["order"]: each["total"] for each in document["3.5"]["orders"]}
    assert {order: totals[order] for order in by_hand} == by_hand
    assert document["3.5"]["uniform"]["total"] == found.uniform.total


def test_the_theory_is_measured_once_and_reads_the_model_once(small_run, measured, computed_layers):
    run = small_run()
    run.capture()
    computed_layers.clear()
    first = measured(run)
    assert computed_layers == [0, 1, 2]
    computed_layers.clear()
    assert measured(run) == first
    assert computed_layers == []


def test_an_interrupted_measurement_resumes_from_its_last_boundary(
    small_run, another_store, measured, dying_at, computed_layers
):
    run = small_run()
    run.capture()
    with dying_at("layerwise.tasks.running.layer_boundaries.BoundaryClock.due", call=3):
        measured(run, boundary_layers=1)
    computed_layers.clear()
    resumed = measured(run, boundary_layers=1)
    assert computed_layers == [2]
    assert resumed.content == measured(small_run(run.folder, another_store())).content


def test_an_error_that_overflows_is_refused(small_run, measured, llama):
    """The norm turns hidden states of 1e20 into zeros, so the loss is finite; their squares are not."""
    model = llama(num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e25
    run = small_run(model, dtype="float32")
    with pytest.raises(ValueError, match="not finite in float32"):
        measured(run)


def test_the_page_shows_every_theorem_and_loads_no_other_files(small_run, measured):
    run = small_run()
    artifact = measured(run)
    page = theory_page.fn(run.store, artifact, "<b>model</b> at 0.5", {"sparsity": 0.5})
    html = run.store.read(page, "theory.html").decode()
    for sentence in sentences(findings_of(*read_tables(run.store, artifact))).values():
        assert sentence in unescape(html)
    assert "<b>model</b>" not in html
    assert "&lt;b&gt;model&lt;/b&gt; at 0.5" in html
    assert html.count("<svg") == 6  # two layouts of each figure
    assert "src=" not in html
    assert "https://" not in html
    for name in ("rise", "factor", "orders"):
        ElementTree.fromstring(run.store.read(page, f"figures/{name}.svg").decode())
        assert run.store.read(page, f"figures/{name}.png").startswith(b"\x89PNG")


def test_a_page_is_built_once_and_its_bytes_are_reproducible(small_run, another_store, measured):
    run = small_run()
    first = theory_page.fn(run.store, measured(run), "model", {})
    assert theory_page.fn(run.store, measured(run), "model", {}) == first
    other = small_run(run.folder, another_store())
    assert theory_page.fn(other.store, measured(other), "model", {}).content == first.content


def test_consecutive_layers_are_shown_as_ranges():
    assert ranges([0, 1, 2, 3, 7, 8, 11]) == "0 to 3, 7, 8, 11"
