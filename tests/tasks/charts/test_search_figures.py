"""The figures by layer, by linear and by stage: their labels, for rows that can be checked by eye."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from layerwise.tasks.charts.drawing import HEIGHT, Look, line_figure, linear_axis, png_file, svg_file
from layerwise.tasks.charts.search_figures import (
    error_by_layer,
    sparsity_by_layer,
    sparsity_by_linear,
    time_by_stage,
)

SVG = "{http://www.w3.org/2000/svg}"


def parts(chart) -> tuple[set[str], list[str]]:
    """Return the texts of a figure, and the labels of its marks."""
    svg = ElementTree.fromstring(chart.wide)
    words = {"".join(text.itertext()) for text in svg.iter(f"{SVG}text")}
    marks = [mark.get("aria-label") for mark in svg.iter(f"{SVG}path") if mark.get("aria-label")]
    return words, marks


def sparsity(plan, kind, layer, share):
    return {"plan": plan, "kind": kind, "layer": layer, "sparsity": share}


def test_all_plans_are_drawn_and_the_best_and_the_compared_ones_are_named():
    rows = [
        sparsity("uniform", "uniform", 0, 0.5),
        sparsity("uniform", "uniform", 1, 0.5),
        sparsity("beta 0.02", "best", 0, 0.49),
        sparsity("beta 0.02", "best", 1, 0.51),
        sparsity("beta 0.1", "tried", 0, 0.45),
        sparsity("beta 0.1", "tried", 1, 0.55),
        sparsity("owl, alpha 1", "compared", 0, 0.4),
        sparsity("owl, alpha 1", "compared", 1, 0.6),
    ]
    words, marks = parts(sparsity_by_layer(rows))
    assert {"uniform", "best, beta 0.02", "other plans", "owl, alpha 1"} <= words
    assert "beta 0.02, layer 1: sparsity 0.5100" in marks
    assert "owl, alpha 1, layer 0: sparsity 0.4000" in marks


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (3, [0, 1, 2]),
        (12, [*range(12)]),
        (30, [0, 5, 10, 15, 20, 25]),
        (80, [*range(0, 80, 5)]),
        (126, [*range(0, 126, 10)]),
    ],
)
def test_the_axis_of_layers_labels_whole_layers(layers, named):
    rows = [sparsity("uniform", "best", layer, 0.5) for layer in range(layers)]
    words, _ = parts(sparsity_by_layer(rows))
    assert {word for word in words if word.isdigit()} == {str(layer) for layer in named}


def test_lines_have_the_given_widths_and_differ_in_dash_and_shape_too():
    """With a scale of widths, Vega would interpolate between them."""
    rows = [{"line": line, "detail": line, "x": x, "y": x, "label": line} for line in "abcd" for x in (0, 1)]
    looks = {
        "a": Look("#111111", 2.6),
        "b": Look("#222222", 1.8, (7, 4), "square"),
        "c": Look("#333333", 1.8, (2, 2), "diamond"),
        "d": Look("#444444", 0.7),
    }
    figure = line_figure(rows, looks, {"title": "x"}, linear_axis([0, 1], "y"))
    for svg in (figure.wide, figure.narrow):
        for look in looks.values():
            assert f'stroke="{look.color}" stroke-width="{look.width}"' in svg
        assert {"7,4", "2,2"} <= set(re.findall(r'stroke-dasharray="(.*?)"', svg))
        points = [set(re.findall(rf'd="([^"]*)" fill="{looks[name].color}"', svg)) for name in "abc"]
        assert all(points)
        assert len(set.union(*points)) == sum(map(len, points))


def test_names_of_lines_that_end_together_are_apart_in_the_order_of_the_lines():
    ends = {"top": 0.9, "middle": 0.899, "low": 0.001, "lowest": 0.0}
    rows = [
        {"line": line, "detail": line, "x": x, "y": y, "label": line}
        for line, end in ends.items()
        for x, y in ((0, 0.5), (1, end))
    ]
    axis = linear_axis([row["y"] for row in rows], "y")
    figure = line_figure(rows, {name: Look("#111111") for name in ends}, {"title": "x"}, axis)
    for svg in (figure.wide, figure.narrow):
        found = [text for text in ElementTree.fromstring(svg).iter(f"{SVG}text") if text.text in ends]
        heights = {text.text: float(text.get("transform").split(",")[1].rstrip(")")) for text in found}
        assert sorted(ends, key=heights.get) == list(ends)
        placed = sorted(heights.values())
        assert all(lower - upper >= 14 for upper, lower in pairwise(placed))
        assert max(placed) < HEIGHT + 6  # a text is placed by its baseline


def test_a_single_plan_is_both_uniform_and_best():
    words, marks = parts(sparsity_by_layer([sparsity("uniform", "best", 0, 0.5)]))
    assert "best, uniform" in words
    assert marks == ["uniform, layer 0: sparsity 0.5000"]


def test_errors_are_relative_to_the_energy_of_the_dense_output():
    rows = [
        {"model": model, "layer": layer, "relative_error": error}
        for model, errors in (("uniform", (0.1, 0.4)), ("best", (0.05, 0.2)))
        for layer, error in enumerate(errors)
    ]
    words, marks = parts(error_by_layer(rows))
    assert {"uniform", "best"} <= words
    assert "best, layer 1: 0.2 of the dense output's energy" in marks
    local = [{**row, "relative_local_error": row["relative_error"] / 2} for row in rows]
    words, marks = parts(error_by_layer(local))
    assert "uniform, added by the layer itself" in words


def test_an_error_of_zero_can_be_drawn():
    rows = [
        {"model": "best", "layer": layer, "relative_error": error} for layer, error in ((0, 0.0), (1, 9.0))
    ]
    assert len(parts(error_by_layer(rows))[1]) == 2


def test_the_map_has_every_linear_with_its_counts():
    rows = [
        {"layer": layer, "linear": name, "weights": 2000, "zeros": zeros, "sparsity": zeros / 2000}
        for layer in (0, 1)
        for name, zeros in (("q_proj", 1000), ("down_proj", 1100))
    ]
    words, marks = parts(sparsity_by_linear(rows))
    assert {"q_proj", "down_proj"} <= words
    assert "layer 1, down_proj: 0.5500, 1,100 of 2,000 weights" in marks


def stage(name, start, end):
    return {"stage": name, "key": name, "start": start, "end": end, "seconds": end - start}


def test_stages_are_drawn_in_a_unit_that_fits():
    words, marks = parts(time_by_stage([stage("capture", 0.0, 9.0), stage("select", 9.0, 9.01)]))
    assert {"capture", "select", "seconds since the start, without pauses"} <= words
    assert marks == ["capture: 9.0 s", "select: 0.0 s"]
    words, _ = parts(time_by_stage([stage("capture", 0.0, 40000.0)]))
    assert "hours since the start, without pauses" in words


def test_characters_that_xml_forbids_are_drawn_as_escapes():
    name = "beta \x1b[2J \uffff \udcff [old] & <b>"
    rows = [sparsity(name, "best", layer, 0.5) for layer in range(2)]
    words, marks = parts(sparsity_by_layer(rows))
    shown = r"beta \x1b[2J \uffff \udcff [old] & <b>"
    assert f"best, {shown}" in words
    assert f"{shown}, layer 0: sparsity 0.5000" in marks
    picture = svg_file(sparsity_by_layer(rows), "figure", ["Title", name])
    assert any(
        shown in "".join(text.itertext()) for text in ElementTree.fromstring(picture).iter(f"{SVG}text")
    )
    assert png_file(picture).startswith(b"\x89PNG")
