"""Select: the chosen beta and its uncertainty, for losses that can be checked by hand."""

import math
from dataclasses import replace

import pytest

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.scoring.perplexity import DIVERGED
from layerwise.storage.artifact import Artifact
from layerwise.tasks.results.lane_scores import LaneScore
from layerwise.tasks.results.selection import read_selection
from layerwise.tasks.select import compare, select


def lane(beta, *losses):
    return LaneScore(SparsityPlan(beta, (0.5, 0.5)), Artifact(f"lane/{beta} {losses}", {}), losses, 0.5)


# Differences to beta 0.1: 0.1, 0.3, 0.2 (mean 0.2, standard error 0.1 / sqrt 3) and 1, 1, 4 (mean 2, error 1).
UNIFORM, BEST, STEEP = lane(0.0, 2.0, 3.0, 7.0), lane(0.1, 1.0, 2.0, 3.0), lane(0.2, 1.1, 2.3, 3.2)


def test_the_lowest_mean_loss_wins_and_the_next_is_the_runner_up():
    selection = compare([UNIFORM, BEST, STEEP], dense_perplexity=5.0)
    assert (selection.best, selection.runner_up) == (1, 2)
    assert selection.best_row.beta == 0.1
    assert selection.rows[0].beta == 0.0
    assert [row.loss for row in selection.rows] == pytest.approx([4.0, 2.0, 2.2])
    assert [row.perplexity for row in selection.rows] == pytest.approx([math.e**4, math.e**2, math.e**2.2])
    assert selection.dense_perplexity == 5.0


def test_every_row_is_compared_with_the_best_window_by_window():
    uniform, best, steep = compare([UNIFORM, BEST, STEEP], 5.0).rows
    assert best.above_best is None
    assert (uniform.above_best.mean, uniform.above_best.t) == pytest.approx((2.0, 2.0))
    assert (steep.above_best.mean, steep.above_best.t) == pytest.approx((0.2, 0.2 / (0.1 / math.sqrt(3))))


def test_the_verdict_names_runner_up_and_uniform_with_their_uncertainty():
    assert compare([UNIFORM, BEST, STEEP], 5.0).verdict == (
        "beta 0.1: perplexity 18.1 % below the runner-up, beta 0.2 (t = 3.5: not significant); "
        "perplexity 86.5 % below uniform, beta 0 (t = 2.0: not significant)"
    )


def test_a_verdict_names_uniform_once_if_it_is_the_runner_up():
    assert compare([UNIFORM, BEST], 5.0).verdict == (
        "beta 0.1: perplexity 86.5 % below the runner-up, beta 0 (t = 2.0: not significant)"
    )


def test_uniform_may_be_the_best():
    # Differences 0.5 and 0.51: mean 0.505, standard error 0.005.
    selection = compare([lane(0.0, 1.0, 2.0), lane(0.1, 1.5, 2.51)], 5.0)
    assert selection.best == 0
    assert selection.verdict == (
        "beta 0: perplexity 39.6 % below the runner-up, beta 0.1 (t = 101.0: significant)"
    )


def test_a_diverged_lane_loses_and_the_others_are_compared():
    selection = compare([lane(0.0, DIVERGED, DIVERGED), lane(0.1, 1.5, 2.5), lane(0.2, 1.0, 2.0)], 5.0)
    assert (selection.best, selection.runner_up) == (2, 1)
    assert "perplexity 100.0 % below uniform" in selection.verdict


def test_the_flattest_of_plans_with_equal_loss_is_chosen():
    selection = compare(
        [lane(0.0, 3.0, 3.0), lane(0.1, 1.0, 2.0), lane(0.2, 2.0, 1.0), lane(0.3, 1.0, 2.0)], 5.0
    )
    assert (selection.best, selection.runner_up) == (1, 2)
    assert selection.rows[3].above_best.t is None
    assert "(t = 0.0: not significant)" in selection.verdict


def test_without_spread_t_is_undefined_and_the_difference_not_significant():
    selection = compare([lane(0.0, 2.0, 3.0), lane(0.1, 1.0, 2.0)], 5.0)
    assert selection.rows[0].above_best.t is None
    assert "(t = undefined: not significant)" in selection.verdict


def test_one_plan_is_chosen_without_a_comparison():
    selection = compare([UNIFORM], 5.0)
    assert (selection.best, selection.runner_up) == (0, None)
    assert selection.verdict == "beta 0 was the only one tried"


def test_a_lane_stopped_early_loses_and_is_compared_on_the_windows_it_has_seen():
    # On its two windows it is 0.5 and 0.7 above the best lane, whose mean is 2: its loss is reported as 2.6.
    stopped = lane(0.3, 1.5, 2.7)
    selection = compare([UNIFORM, BEST, stopped], 5.0)
    assert (selection.best, selection.runner_up) == (1, 0)
    assert [row.windows for row in selection.rows] == [3, 3, 2]
    row = selection.rows[2]
    assert (row.above_best.mean, row.above_best.t, row.above_best.windows) == pytest.approx((0.6, 6.0, 2))
    assert (row.loss, row.perplexity) == pytest.approx((2.6, math.e**2.6))


def test_a_lane_stopped_early_is_never_the_best_even_with_the_lowest_loss():
    assert compare([UNIFORM, BEST, lane(0.3, 0.1, 0.2)], 5.0).best == 1


def test_with_divergences_the_smallest_mean_divergence_wins_whatever_the_losses():
    # Differences of divergences: .5, .1 and .3 on the windows that the other plan has seen.
    best = replace(UNIFORM, divergences=(0.5, 0.5, 0.2))
    stopped = replace(lane(0.1, 1.0, 2.0), divergences=(1.0, 0.6))
    worse = replace(STEEP, divergences=(1.0, 0.6, 0.5))
    selection = compare([best, stopped, worse], 5.0)
    assert (selection.criterion, selection.best, selection.runner_up) == ("kl", 0, 2)
    assert [row.kl for row in selection.rows] == pytest.approx([0.4, 0.7, 0.7])
    assert (selection.rows[2].above_best.mean, selection.rows[2].above_best.t) == pytest.approx(
        (0.3, 1.5 * math.sqrt(3))
    )
    assert [row.loss for row in selection.rows] == pytest.approx(
        [4.0, 3.0, 2.2]
    )  # 4 - 1 on the first two windows
    assert selection.verdict == (
        "beta 0: KL divergence 42.9 % below the runner-up, beta 0.2 (t = 2.6: not significant)"
    )


@pytest.mark.parametrize(
    "lanes", [[UNIFORM, BEST, STEEP], [UNIFORM], [replace(UNIFORM, divergences=(0.1, 0.2, 0.3))]]
)
def test_a_stored_selection_is_read_back_unchanged(store, lanes):
    artifact = select.fn(store, lanes, 5.0)
    assert read_selection(store, artifact) == compare(lanes, 5.0)
    assert artifact.facts["verdict"] == compare(lanes, 5.0).verdict


def test_other_lanes_or_another_dense_perplexity_give_another_key(local_store):
    keys = {
        select.fn(local_store, lanes, dense).key
        for lanes, dense in (([UNIFORM, BEST], 5.0), ([UNIFORM, STEEP], 5.0), ([UNIFORM, BEST], 6.0))
    }
    assert len(keys) == 3
