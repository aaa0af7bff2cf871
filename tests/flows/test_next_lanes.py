"""Strategies: which lanes run next, on losses that can be checked by hand."""

import pytest

from flows.next_lanes import LaneRequest, Strategy

BETAS = (0.0, 0.002, 0.004, 0.006)


def without_offset(betas):
    return tuple((beta, 0.0) for beta in betas)


def race(windows: int) -> Strategy:
    return Strategy("race", without_offset(BETAS), 4, windows)


def losses(level: float, windows: int) -> list[float]:
    """Around ``level``, never twice the same distance from another level's."""
    return [level + 0.001 * ((7 * window + round(1000 * level)) % 5) for window in range(windows)]


def play(strategy: Strategy, levels: dict[int, float]) -> list[LaneRequest]:
    """All requests of a search whose lanes have these levels."""
    known: dict[int, list[float]] = {}
    requests = []
    while request := strategy.next_lanes(known):
        requests.append(request)
        start, end = request.windows or (0, strategy.windows)
        for plan in request.plans:
            known.setdefault(plan, []).extend(losses(levels[plan], strategy.windows)[start:end])
    return requests


def test_a_grid_asks_for_everything_at_once():
    strategy = Strategy("grid", without_offset(BETAS), 4, 12)
    assert play(strategy, dict.fromkeys(range(4), 1.0)) == [LaneRequest((0, 1, 2, 3))]


def test_a_race_goes_on_with_the_two_best_and_uniform():
    first, *later = play(race(32), {0: 9.0, 1: 2.0, 2: 1.0, 3: 5.0})
    assert (first.plans, first.windows) == ((0, 1, 2, 3), (0, 8))
    assert {request.plans for request in later} == {(0, 1, 2)}
    assert later[0].windows[0] == 8
    assert later[-1].windows[1] == 32
    assert all(a.windows[1] == b.windows[0] for a, b in zip(later, later[1:], strict=False))


def test_nobody_is_stopped_in_a_race_of_equals():
    assert {request.plans for request in play(race(32), dict.fromkeys(range(4), 1.0))} == {(0, 1, 2, 3)}


def test_a_race_over_few_windows_is_a_grid():
    assert play(race(8), {0: 9.0, 1: 2.0, 2: 1.0, 3: 5.0}) == [LaneRequest((0, 1, 2, 3))]


def test_a_race_asks_again_for_a_round_of_which_one_lane_is_missing():
    strategy = race(32)
    first = {plan: losses(1.0, 8) for plan in range(3)}
    assert strategy.next_lanes(first) == LaneRequest((0, 1, 2, 3), (0, 8))


@pytest.mark.parametrize("best", range(12))
def test_an_adaptive_search_finds_the_bottom_with_fewer_lanes_and_tries_uniform(best):
    betas = tuple(0.002 * number for number in range(12))
    levels = {plan: 3 + 0.02 * (plan - best) ** 2 for plan in range(12)}
    requests = play(Strategy("adaptive", without_offset(betas), 8, 4), levels)
    tried = [plan for request in requests for plan in request.plans]
    assert {request.windows for request in requests} == {None}
    assert 0 in requests[0].plans
    assert min(tried, key=levels.__getitem__) == best
    assert len(tried) == len(set(tried)) <= 8


def test_an_adaptive_search_keeps_its_budget():
    betas = tuple(0.001 * number for number in range(30))
    levels = {plan: float(plan % 7) for plan in range(30)}
    requests = play(Strategy("adaptive", without_offset(betas), 5, 4), levels)
    assert sum(len(request.plans) for request in requests) <= 5


def test_a_two_parameter_search_finds_the_bottom_of_a_bowl_within_its_budget():
    betas, offsets = [0.002 * number for number in range(8)], (-0.1, -0.05, 0.0, 0.05, 0.1)
    points = sorted(
        ((beta, offset) for beta in betas for offset in offsets), key=lambda point: point != (0, 0)
    )
    levels = {
        plan: 3 + 0.02 * (500 * beta - 4) ** 2 + 40 * (offset - 0.05) ** 2
        for plan, (beta, offset) in enumerate(points)
    }
    requests = play(Strategy("two-parameter", tuple(points), 20, 4), levels)
    tried = [plan for request in requests for plan in request.plans]
    assert points[min(tried, key=levels.__getitem__)] == (0.008, 0.05)
    assert 0 in requests[0].plans
    assert len(tried) == len(set(tried)) <= 20
