"""Two-parameter search: along the spread, along the offset, around the best."""

import itertools
import random

import pytest

from layerwise.strategies.trials import Trial
from layerwise.strategies.two_parameter import TwoParameterSearch
from tests.layerwise.played_search import proposals, tried

SPREADS = tuple(0.002 * index for index in range(11))
OFFSETS = (-0.1, -0.05, 0.0, 0.05, 0.1)
POINTS = list(itertools.product(SPREADS, OFFSETS))


def bowl(spread: float, offset: float, twist: float = 0.0):
    """Return a loss with its minimum at these values; ``twist`` rotates its axes, and 1 and -1 make it a valley."""

    def loss(point):
        steps, shifts = (point[0] - spread) / 0.002, (point[1] - offset) / 0.05
        return 3 + 0.01 * (steps**2 + shifts**2 + twist * steps * shifts)

    return loss


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("offset", OFFSETS)
def test_the_minimum_is_found_at_any_place(spread, offset):
    for twist in (0.0, 0.5, -0.5):
        loss = bowl(spread, offset, twist)
        points = tried(TwoParameterSearch(SPREADS, OFFSETS, budget=55), loss)
        assert min(points, key=loss) == (spread, offset)
        assert len(points) <= 25


def test_without_a_limit_the_result_is_at_least_as_good_as_its_neighbours():
    dice, search = random.Random(0), TwoParameterSearch(SPREADS, OFFSETS, budget=55)
    for _ in range(50):
        losses = {point: dice.random() for point in POINTS}
        points = tried(search, losses.__getitem__)
        best = min(points, key=losses.__getitem__)
        row, column = SPREADS.index(best[0]), OFFSETS.index(best[1])
        around = {
            (SPREADS[near], OFFSETS[beside])
            for near in range(max(row - 1, 0), min(row + 2, 11))
            for beside in range(max(column - 1, 0), min(column + 2, 5))
        }
        assert around <= set(points)


@pytest.mark.parametrize("budget", range(1, 20))
def test_the_budget_is_kept_uniform_comes_first_and_nothing_is_tried_twice(budget):
    dice = random.Random(budget)
    for _ in range(20):
        losses = {point: dice.choice([1.0, 2.0, 700.0]) for point in POINTS}
        points = tried(TwoParameterSearch(SPREADS, OFFSETS, budget), losses.__getitem__)
        assert len(set(points)) == len(points) <= budget
        assert points[0] == (0.0, 0.0)


def test_offsets_are_tried_at_the_best_spread_after_the_spreads():
    batches = proposals(TwoParameterSearch(SPREADS, OFFSETS), bowl(0.01, 0.0))
    assert batches[0] == ((0.0, 0.0), (0.004, 0.0), (0.01, 0.0))
    along_spread = [batch for batch in batches if all(offset == 0 for _, offset in batch)]
    assert batches[: len(along_spread)] == along_spread
    assert batches[len(along_spread)] == ((0.01, -0.05), (0.01, 0.05))


def test_half_of_the_budget_is_left_for_the_offset():
    points = tried(TwoParameterSearch(SPREADS, OFFSETS, budget=8), bowl(0.014, 0.1))
    assert [offset for _, offset in points[:4]] == [0.0] * 4
    assert {offset for _, offset in points[4:6]} == {-0.05, 0.05}


def test_with_harmful_offsets_the_best_spread_has_offset_0():
    loss = bowl(0.008, 0.0)
    assert min(tried(TwoParameterSearch(SPREADS, OFFSETS), loss), key=loss) == (0.008, 0.0)


def test_with_one_offset_it_is_a_search_along_the_spread():
    points = tried(TwoParameterSearch(SPREADS, (0.0,)), bowl(0.008, 0.0))
    assert {offset for _, offset in points} == {0.0}
    assert (0.008, 0.0) in points


def test_a_resumed_search_proposes_the_same_points():
    loss, trials = bowl(0.012, -0.05, 0.5), []
    for batch in [*proposals(TwoParameterSearch(SPREADS, OFFSETS, 20), loss), ()]:
        assert TwoParameterSearch(SPREADS, OFFSETS, 20).propose(tuple(trials)) == batch
        trials += [Trial(point, (loss(point),)) for point in batch]


def test_candidates_without_the_uniform_plan_are_refused():
    with pytest.raises(ValueError, match="must be among the points"):
        TwoParameterSearch((0.1, 0.2), (0.0,))
    with pytest.raises(ValueError, match="must be among the points"):
        TwoParameterSearch((0.0, 0.2), (-0.1, 0.1))
    with pytest.raises(ValueError, match="offsets are .* must be finite, strictly ascending"):
        TwoParameterSearch((0.0, 0.2), (0.1, 0.0))


def test_a_trial_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="not among the 55 candidates"):
        TwoParameterSearch(SPREADS, OFFSETS).propose([Trial((0.001, 0.0), (1.0,))])
