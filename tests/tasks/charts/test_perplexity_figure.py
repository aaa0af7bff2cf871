"""The curve of perplexity against beta: its labels, and that every possible result can be drawn."""

import math
import re
from xml.etree import ElementTree

import pytest

from layerwise.scoring.perplexity import DIVERGED, PairedDifference
from layerwise.storage.artifact import Artifact
from layerwise.tasks.charts.drawing import png_file, svg_file, svg_inside
from layerwise.tasks.charts.perplexity_figure import perplexity_by_beta
from layerwise.tasks.results.evaluation import TestResult
from layerwise.tasks.results.report_tables import betas_table, criterion_interval
from layerwise.tasks.results.search_result import FinishedSearch
from layerwise.tasks.results.selection import ScoreRow, Selection

SVG = "{http://www.w3.org/2000/svg}"


def row(beta, loss, mean=None, t=None, windows=3):
    difference = None if mean is None else PairedDifference(mean, t, windows)
    return ScoreRow(beta, loss, math.exp(loss), difference, 0.5, windows)


def selection(*rows, best=1, dense=4.0):
    return Selection(rows, best, None, dense)


def chart_of(found: Selection):
    """Return the curve of a search with this selection."""
    test = TestResult(3, 4.0, 5.0, 5.0, None)
    search = FinishedSearch(Artifact("search/0", {}), {}, "demo", found, test, {})
    return perplexity_by_beta(betas_table(search), found.dense_perplexity)


def words(svg: str) -> list[str]:
    """Return all texts of a figure, in the order of drawing."""
    texts = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return [line for text in texts for line in text.itertext()]  # a title has several


def said_by(found: Selection) -> list[str]:
    return words(chart_of(found).wide)


UNIFORM, BEST = row(0.0, 2.5, 0.5, 10.0), row(0.02, 2.0)
NEAR, FAR = row(0.03, 2.1, 0.1, 1.0), row(0.04, 6.0, 4.0, 9.0)


def test_the_curve_names_dense_uniform_and_best_with_their_perplexities():
    said = said_by(selection(UNIFORM, BEST, NEAR))
    assert {"dense", "uniform", "best"} <= set(said)  # next to the marks
    assert {"dense: 4.00", "uniform: 12.18", "best, beta 0.02: 7.39", "perplexity"} <= set(said)


def test_the_label_of_a_point_has_the_plan_its_perplexity_and_the_interval():
    svg = ElementTree.fromstring(chart_of(selection(UNIFORM, BEST, NEAR)).wide)
    labels = [mark.get("aria-label") for mark in svg.iter(f"{SVG}path")]
    # One standard error of the difference is .1 nats: 4.31 of them for two degrees of freedom.
    low, high = math.exp(2.1 - 0.431), math.exp(2.1 + 0.431)
    assert f"beta 0.03: perplexity 8.17, 95 % interval {low:.2f} to {high:.2f}" in labels
    assert "beta 0.02: perplexity 7.39" in labels


def test_plans_that_are_not_significantly_worse_are_distinguished():
    assert "not significantly worse" in said_by(selection(UNIFORM, BEST, NEAR))
    assert "not significantly worse" not in said_by(selection(UNIFORM, BEST))


def test_a_bar_is_the_interval_of_the_paired_difference():
    # Three windows, two degrees of freedom: 4.31 standard errors, and one error is .2 / 2 nats.
    low, high = criterion_interval(row(0.03, 2.2, 0.2, 2.0))
    assert (math.log(low), math.log(high)) == pytest.approx((2.2 - 0.431, 2.2 + 0.431))


@pytest.mark.parametrize("without", [BEST, row(0.0, 2.0, 0.1, None), row(0.0, 2.0, 0.0, 0.0)])
def test_there_is_no_bar_without_a_standard_error(without):
    assert criterion_interval(without) == (without.perplexity, without.perplexity)


def test_a_wide_range_has_a_logarithmic_axis():
    ticks = {"5", "10", "50", "100", "500"}
    assert ticks <= set(said_by(selection(UNIFORM, BEST, FAR)))
    assert not ticks <= set(said_by(selection(UNIFORM, BEST, NEAR)))


def test_a_failed_plan_is_marked_and_does_not_flatten_the_others():
    diverged = row(0.05, DIVERGED, DIVERGED - 2.0, 50.0)
    said = said_by(selection(UNIFORM, BEST, diverged))
    assert "failed" in said
    assert max(float(text) for text in said if re.fullmatch(r"\d+", text)) < 100


@pytest.mark.parametrize(
    "found",
    [
        selection(row(0.0, 2.0), best=0),
        selection(row(0.0, DIVERGED), row(0.02, DIVERGED, 0.0, None), best=0),
        # One of three windows diverged for each plan, but not the same one: the error exceeds every perplexity.
        selection(row(0.0, 236.0, 2.0, 0.005), row(0.02, 234.0)),
        selection(row(0.0, DIVERGED, DIVERGED - 2.0, 50.0), BEST),
    ],
    ids=["one beta", "all diverged", "an error beyond all numbers", "uniform diverged"],
)
def test_every_result_can_be_drawn(found):
    assert "perplexity" in said_by(found)


def test_the_same_search_gives_the_same_bytes_without_references_to_other_files():
    first, second = (chart_of(selection(UNIFORM, BEST, FAR)) for _ in range(2))
    svg = svg_inside(first, "curve")
    assert svg_inside(second, "curve") == svg  # Vega counts clips over all figures of a process
    files = [svg_file(chart, "curve", ["demo"]) for chart in (first, second)]
    assert files[0] == files[1]
    assert png_file(files[0]) == png_file(files[1])
    assert not re.search(r'(href|src)="(?!#)', svg)


def test_identifiers_of_two_figures_on_one_page_differ():
    chart = chart_of(selection(UNIFORM, BEST, NEAR))
    first, second = (set(re.findall(r'\bid="(.*?)"', svg_inside(chart, name))) for name in ("one", "two"))
    assert first
    assert not first & second
    assert set(re.findall(r"url\(#(.*?)\)", svg_inside(chart, "one"))) <= first


def test_markup_in_a_title_is_escaped():
    chart = chart_of(selection(UNIFORM, BEST))
    assert "a $x$ <b> & _c^" in words(svg_file(chart, "curve", ["Perplexity", "a $x$ <b> & _c^"]))
