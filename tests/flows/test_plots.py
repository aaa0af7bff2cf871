"""The two figures of a search: what they say, and that they are drawn for whatever a search can find."""

import math
import re
from xml.etree import ElementTree

import pytest

from flows.plots import perplexity_by_beta, perplexity_interval, sparsity_by_layer
from layerwise.perplexity import DIVERGED, PairedDifference
from tasks.select import ScoreRow, Selection


def row(beta, loss, mean=None, t=None, windows=3):
    difference = None if mean is None else PairedDifference(mean, t, windows)
    return ScoreRow(beta, loss, math.exp(loss), difference, 0.5, windows)


def selection(*rows, best=1, dense=4.0):
    return Selection(rows, best, None, dense)


UNIFORM, BEST = row(0.0, 2.5, 0.5, 10.0), row(0.02, 2.0)
NEAR, FAR = row(0.03, 2.1, 0.1, 1.0), row(0.04, 6.0, 4.0, 9.0)


def words(svg: bytes) -> list[str]:
    """All text of a figure, in the order it is drawn."""
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in texts]


def test_the_curve_names_dense_uniform_and_best_with_their_perplexities():
    said = words(perplexity_by_beta(selection(UNIFORM, BEST, NEAR), "demo at 0.6"))
    assert {"dense: 4.00", "uniform: 12.18", "best, beta 0.02: 7.39"} <= set(said)
    assert {"Perplexity on the selection text", "demo at 0.6", "perplexity"} <= set(said)


def test_what_is_not_surely_worse_than_the_best_is_told_from_what_is():
    assert "not surely worse" in words(perplexity_by_beta(selection(UNIFORM, BEST, NEAR), ""))
    assert "not surely worse" not in words(perplexity_by_beta(selection(UNIFORM, BEST), ""))


def test_a_bar_is_the_interval_of_the_paired_difference():
    # Three windows, two degrees of freedom: 4.31 standard errors, and one error is .2 / 2 nats.
    low, high = perplexity_interval(row(0.03, 2.2, 0.2, 2.0))
    assert (math.log(low), math.log(high)) == pytest.approx((2.2 - 0.431, 2.2 + 0.431))


@pytest.mark.parametrize("without", [BEST, row(0.0, 2.0, 0.1, None), row(0.0, 2.0, 0.0, 0.0)])
def test_there_is_no_bar_without_a_standard_error(without):
    assert perplexity_interval(without) == (without.perplexity, without.perplexity)


def test_a_wide_range_is_drawn_by_orders_of_magnitude():
    ticks = {"5", "10", "20", "50", "100", "200"}
    assert ticks <= set(words(perplexity_by_beta(selection(UNIFORM, BEST, FAR), "")))
    assert not ticks <= set(words(perplexity_by_beta(selection(UNIFORM, BEST, NEAR), "")))


def test_a_beta_that_failed_is_marked_and_does_not_flatten_the_others():
    diverged = row(0.05, DIVERGED, DIVERGED - 2.0, 50.0)
    said = words(perplexity_by_beta(selection(UNIFORM, BEST, diverged), ""))
    assert "failed" in said
    assert max(float(text) for text in said if re.fullmatch(r"\d+", text)) < 100


@pytest.mark.parametrize(
    "found",
    [
        selection(row(0.0, 2.0), best=0),
        selection(row(0.0, DIVERGED), row(0.02, DIVERGED, 0.0, None), best=0),
        # One window of three diverged for each, but not the same one: the error is larger than any perplexity.
        selection(row(0.0, 236.0, 2.0, 0.005), row(0.02, 234.0)),
        selection(row(0.0, DIVERGED, DIVERGED - 2.0, 50.0), BEST),
    ],
    ids=["one beta", "all diverged", "an error beyond all numbers", "uniform diverged"],
)
def test_whatever_was_found_can_be_drawn(found):
    assert "perplexity" in words(perplexity_by_beta(found, "demo at 0.6"))


def test_the_plans_are_drawn_side_by_side_and_one_plan_alone():
    said = words(sparsity_by_layer((0.5, 0.5), (0.49, 0.51), "beta 0.02", "demo at 0.5"))
    assert {"uniform", "best (beta 0.02)", "Sparsity of every decoder layer", "demo at 0.5"} <= set(said)
    alone = words(sparsity_by_layer((0.5, 0.5), None, "beta 0", ""))
    assert not [text for text in alone if text.startswith("best")]


def test_the_same_search_gives_the_same_bytes_and_nothing_is_fetched_from_elsewhere():
    found = selection(UNIFORM, BEST, FAR)
    svg = perplexity_by_beta(found, "demo at 0.6")
    assert perplexity_by_beta(found, "demo at 0.6") == svg
    assert b"<dc:date>" not in svg
    assert not re.search(rb'(href|src)="(?!#)', svg)


def test_a_title_of_any_characters_is_text():
    assert "a $x$ <b> & _c^" in words(perplexity_by_beta(selection(UNIFORM, BEST), "a $x$ <b> & _c^"))
