"""Figures on the theorems of ATP, drawn from the measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from layerwise.scoring.theorem_checks import Findings
from layerwise.scoring.theorem_plans import ASCENDING, DESCENDING, UNIFORM
from layerwise.tasks.charts.drawing import (
    BLUE,
    GREEN,
    GREY,
    OF_BEST,
    OF_UNIFORM,
    PURPLE,
    VERMILION,
    Figure,
    Look,
    layer_axis,
    line_figure,
    measure_axis,
)

SHUFFLED = "shuffled"
TITLES = {
    "rise": "Error that every layer adds, by sparsity",
    "factor": "Factor of the arriving error, by layer",
    "orders": "Error after every layer, by order",
}

Row = Mapping[str, Any]


def figures_of_theory(layers: Sequence[Row], found: Findings) -> dict[str, Figure]:
    """Draw the figures, by name.

    Args:
        layers: one row for each plan and layer, see ``layerwise.tasks.theory.read_tables``.
    """
    return {
        "rise": local_error_by_sparsity(layers),
        "factor": factor_by_layer(found),
        "orders": error_by_order(layers),
    }


def local_error_by_sparsity(layers: Sequence[Row]) -> Figure:
    """Draw the error that a layer adds relative to its dense energy, by sparsity: a thin line per layer, and the median."""
    uniform = [row for row in layers if row["order"] == UNIFORM]
    last = max(row["layer"] for row in uniform)
    names = {0: "first layer", last: "last layer"}
    rows = [
        _row(
            names.get(row["layer"], "other layers"),
            f"layer {row['layer']}",
            row["target"],
            row["local"] / row["energy"],
            f"layer {row['layer']} at sparsity {row['target']:g}",
        )
        for row in uniform
    ]
    for level in dict.fromkeys(row["target"] for row in uniform):
        value = median(row["local"] / row["energy"] for row in uniform if row["target"] == level)
        rows.append(_row("median of all layers", "median", level, value, f"median at sparsity {level:g}"))
    looks = {
        "median of all layers": Look(BLUE, 2.6, shape="circle"),
        "first layer": Look(VERMILION, 1.8, (7, 4), "square"),
        "last layer": Look(GREEN, 1.8, (2, 2), "diamond"),
        "other layers": Look(GREY, 0.7, shape="stroke"),
    }
    x = {"title": "sparsity (fraction of weights removed)"}
    return line_figure(rows, looks, x, _measure_axis(rows, "added error / dense energy"))


def factor_by_layer(found: Findings) -> Figure:
    """Draw the factor by which every layer changes the arriving error, absolute and relative to the signal."""
    names = {"factor": "squared error", "relative_factor": "squared error / energy of the signal"}
    rows = [
        _row(name, name, each.layer, getattr(each, field), f"layer {each.layer}, {name}")
        for field, name in names.items()
        for each in found.propagation.layers
    ]
    ends = [rows[0]["x"], rows[-1]["x"]]
    rows += [_row("1: unchanged", "one", x, 1.0, "1") for x in ends]
    looks = {
        names["factor"]: Look(BLUE, 2.4, shape="circle"),
        names["relative_factor"]: Look(PURPLE, 2.4, (10, 3, 2, 3), "triangle-up"),
        "1: unchanged": Look(GREY, 1.0, shape="stroke"),
    }
    depth = layer_axis(row["x"] for row in rows)
    return line_figure(rows, looks, depth, _measure_axis(rows, "factor of the arriving error"))


def error_by_order(layers: Sequence[Row]) -> Figure:
    """Draw the accumulated error after every layer relative to its dense energy, by order of the same sparsities."""
    target = next(row["target"] for row in layers if row["order"] != UNIFORM)
    rows = [
        _row(
            SHUFFLED if row["order"].startswith(SHUFFLED) else row["order"],
            row["order"],
            row["layer"],
            row["error"] / row["dense_energy"],
            f"{row['order']}, layer {row['layer']} (sparsity {row['sparsity']:.4f})",
        )
        for row in layers
        if row["target"] == target
    ]
    looks = {
        ASCENDING: replace(OF_BEST, width=2.6),
        DESCENDING: Look(PURPLE, 2.2, (10, 3, 2, 3), "triangle-up"),
        UNIFORM: replace(OF_UNIFORM, width=1.6),
        SHUFFLED: Look(GREY, 0.9, shape="stroke"),
    }
    there = {row["line"] for row in rows}
    looks = {name: look for name, look in looks.items() if name in there}
    depth = layer_axis(row["x"] for row in rows)
    return line_figure(rows, looks, depth, _measure_axis(rows, "error / dense energy"))


def _row(line: str, detail: str, x: float, y: float, subject: str) -> dict[str, Any]:
    return {"line": line, "detail": detail, "x": x, "y": y, "label": f"{subject}: {y:.4g}"}


def _measure_axis(rows: Sequence[Row], title: str) -> dict[str, Any]:
    return measure_axis([row["y"] for row in rows], title)
