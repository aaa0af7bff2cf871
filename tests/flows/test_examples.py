"""The examples run: the scripts with a random model of three layers, the notebook with the store that they leave."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from layerwise.calibration.statistics import InputStatistics
from layerwise.flows.report import make_report
from layerwise.flows.runtime import FanOutRuntime, Runtime

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def examples_store(tmp_path_factory) -> str:
    """A store of its own: commands for the newest search do not know the pruner of an example."""
    return str(tmp_path_factory.mktemp("examples") / "store")


def test_the_pruner_of_the_example_compares_shares_of_row_and_column_times_the_root_of_the_norm():
    pruner = runpy.run_path(str(EXAMPLES / "add_a_pruner.py"))["RIA"]()
    inputs = InputStatistics(torch.tensor([1.0, 4.0], dtype=torch.float64), tokens=1)
    # Sums of columns 4 and 40, of rows 7 and 37. First row: 3/4 + 3/7 = 1.18, (4/40 + 4/7) sqrt(2) = .95.
    weight = torch.tensor([[3.0, 4.0], [1.0, 36.0]])
    assert pruner.removal_levels(weight, inputs, [2]).tolist() == [[1, 0], [0, 1]]


def test_a_search_with_the_pruner_of_a_script_exports_reports_and_is_found_again(
    workshop, prefect_backend, examples_store
):
    example = runpy.run_path(str(EXAMPLES / "add_a_pruner.py"))
    result = example["main"](Runtime(store=examples_store), **workshop.parameters())
    assert "ria" in Path(result.report).read_text()
    assert json.loads(Path(result.pruned, "sparsity.json").read_text())
    again = example["main"](Runtime(store=examples_store), **workshop.parameters())
    assert (again.artifact, again.built) == (result.artifact, ())
    with pytest.raises(ValueError, match=r"does not know \(pruner\)"):
        make_report(examples_store, result.artifact.key)


def test_the_comparison_prints_a_line_for_every_search(workshop, prefect_backend, examples_store, capsys):
    example = runpy.run_path(str(EXAMPLES / "compare.py"))
    example["main"](workshop.settings(betas=[0.1]), FanOutRuntime(store=examples_store), pruners=["wanda"])
    lines = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["wanda, one-shot", "wanda, refit"]


def test_the_notebook_draws_the_newest_search_and_holds_no_output(examples_store, monkeypatch):
    cells = json.loads((EXAMPLES / "curve.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    monkeypatch.setenv("LAYERWISE_STORE", examples_store)
    names: dict[str, object] = {}
    drawn = []
    for cell in code:
        before, _, last = "".join(cell["source"]).rpartition("\n\n")
        exec(before, names)
        try:
            drawn.append(eval(last, names))  # a figure, which the notebook shows
        except SyntaxError:
            exec(last, names)
    curve, sparsities = (figure._repr_svg_() for figure in drawn)
    assert all("uniform" in figure for figure in (curve, sparsities))
