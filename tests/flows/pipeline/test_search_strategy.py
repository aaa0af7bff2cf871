"""Search strategies: the lanes that run next, for losses that can be checked by hand."""

from dataclasses import replace

import pytest

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.flows.pipeline.search_strategy import LaneRequest, SearchStrategy
from layerwise.flows.settings import Search
from layerwise.models.skeleton import Linear
from layerwise.tasks.allocate import AllocateSettings

BETAS = (0.0, 0.002, 0.004, 0.006)
HALF = (0.5,) * 4
LINEARS = [[Linear("mlp", 10, 10, False)]] * 4  # four layers of 100 weights


def plans_of(*points: tuple[float, float]) -> tuple[SparsityPlan, ...]:
    return tuple(SparsityPlan(beta, HALF, offset) for beta, offset in points)


def strategy(name: str, points, trials: int, windows: int, **allocation) -> SearchStrategy:
    points = [point if isinstance(point, tuple) else (point, 0.0) for point in points]
    settings = AllocateSettings(0.5, betas=(), **allocation)
    return SearchStrategy(name, plans_of(*points), trials, windows, settings, LINEARS)


def race(windows: int) -> SearchStrategy:
    return strategy("race", BETAS, 4, windows)


def losses(level: float, windows: int) -> list[float]:
    """Losses around ``level``, whose differences to the losses of another level vary by window."""
    return [level + 0.001 * ((7 * window + round(1000 * level)) % 5) for window in range(windows)]


def play(strategy: SearchStrategy, level_of) -> list[LaneRequest]:
    """Return all requests of a search whose lanes have these levels of loss."""
    known: dict[SparsityPlan, list[float]] = {}
    requests = []
    while request := strategy.next_lanes(known):
        requests.append(request)
        start, end = request.windows or (0, strategy.windows)
        for plan in request.plans:
            known.setdefault(plan, []).extend(losses(level_of(plan), strategy.windows)[start:end])
    return requests


def betas_of(request: LaneRequest) -> tuple[float, ...]:
    return tuple(plan.beta for plan in request.plans)


def by_beta(levels):
    return lambda plan: dict(zip(BETAS, levels, strict=True))[plan.beta]


def test_a_grid_requests_all_plans_at_once():
    grid = strategy("grid", BETAS, 4, 12)
    assert play(grid, lambda plan: 1.0) == [LaneRequest(grid.plans)]


def test_a_race_goes_on_with_the_two_best_and_uniform():
    first, *later = play(race(32), by_beta((9.0, 2.0, 1.0, 5.0)))
    assert (betas_of(first), first.windows) == (BETAS, (0, 8))
    assert {betas_of(request) for request in later} == {BETAS[:3]}
    assert later[0].windows[0] == 8
    assert later[-1].windows[1] == 32
    assert all(a.windows[1] == b.windows[0] for a, b in zip(later, later[1:], strict=False))


def test_a_race_of_equal_plans_stops_none_of_them():
    assert {betas_of(request) for request in play(race(32), lambda plan: 1.0)} == {BETAS}


def test_a_race_over_few_windows_is_a_grid():
    assert play(race(8), by_beta((9.0, 2.0, 1.0, 5.0))) == [LaneRequest(race(8).plans)]


def test_a_race_repeats_the_request_of_a_round_with_a_missing_lane():
    first = {plan: losses(1.0, 8) for plan in race(32).plans[:3]}
    assert race(32).next_lanes(first) == LaneRequest(race(32).plans, (0, 8))


@pytest.mark.parametrize("best", range(12))
def test_an_adaptive_search_finds_the_minimum_with_fewer_lanes_and_tries_uniform(best):
    betas = [0.002 * number for number in range(12)]
    requests = play(
        strategy("adaptive", betas, 8, 4), lambda plan: 3 + 0.02 * (round(500 * plan.beta) - best) ** 2
    )
    tried = [beta for request in requests for beta in betas_of(request)]
    assert {request.windows for request in requests} == {None}
    assert 0.0 in betas_of(requests[0])
    assert betas[best] in tried
    assert len(tried) == len(set(tried)) <= 8


def test_an_adaptive_search_keeps_its_budget():
    betas = [0.001 * number for number in range(30)]
    requests = play(strategy("adaptive", betas, 5, 4), lambda plan: round(1000 * plan.beta) % 7)
    assert sum(len(request.plans) for request in requests) <= 5


@pytest.mark.parametrize("best", range(12))
def test_auto_narrows_down_on_the_first_windows_and_scores_uniform_and_the_best_on_all(best):
    betas = [0.002 * number for number in range(12)]
    auto = strategy("auto", betas, 8, 40)
    *narrowing, final = play(auto, lambda plan: 3 + 0.02 * (round(500 * plan.beta) - best) ** 2)
    assert {request.windows for request in narrowing} == {(0, 8)}
    tried = [beta for request in narrowing for beta in betas_of(request)]
    assert len(tried) == len(set(tried)) <= 8
    assert final.windows == (8, 40)
    assert {0.0, betas[best]} <= set(betas_of(final)) <= set(tried)
    assert len(final.plans) <= 4


def test_auto_scores_uniform_and_the_best_two_plans_on_all_windows():
    def finalists(levels):
        levels = dict(zip((0.0, 0.002, 0.004, 0.006, 0.008), levels, strict=True))
        return betas_of(play(strategy("auto", levels, 6, 16), lambda plan: levels[plan.beta])[-1])

    assert finalists((3.0, 2.0, 1.0, 2.1, 3.0)) == (0.0, 0.002, 0.004)
    assert finalists((3.0, 1.1, 1.0, 1.2, 3.0)) == (0.0, 0.002, 0.004)
    assert finalists((0.9, 1.1, 1.0, 1.2, 3.0)) == (0.0, 0.004)


@pytest.mark.parametrize(
    ("above", "finalists"),
    [
        ((0.1, -0.1) * 4, (0.0, 0.002, 0.004, 0.006)),  # t 0
        ((0.1,) * 5 + (-0.1,) * 3, (0.0, 0.002, 0.004, 0.006)),  # mean .025, standard error .0366
        ((0.1,) * 6 + (-0.1,) * 2, (0.0, 0.002, 0.004)),  # mean .05, standard error .0327
        ((0.0,) * 8, (0.0, 0.002, 0.004, 0.006)),
        ((0.1,) * 8, (0.0, 0.002, 0.004)),  # no t
    ],
)
def test_auto_scores_a_third_plan_if_the_first_windows_do_not_tell_it_from_the_best(above, finalists):
    first = {0.0: (3.0,) * 8, 0.002: (1.0,) * 8, 0.004: (1.0,) * 8, 0.008: (3.0,) * 8}
    first[0.006] = tuple(1.0 + each for each in above)
    auto = strategy("auto", sorted(first), 6, 16)
    known = {plan: first[plan.beta] for plan in auto.plans}
    assert auto.next_lanes(known) == LaneRequest(
        tuple(plan for plan in auto.plans if plan.beta in finalists), (8, 16)
    )


def test_auto_that_is_stopped_still_scores_the_best_plans_on_all_windows():
    betas = [0.002 * number for number in range(12)]
    stopped = replace(strategy("auto", betas, 8, 40), stop_after=3)
    first, final = play(stopped, lambda plan: 3 + plan.beta)
    assert (len(first.plans), first.windows, first.continues) == (3, (0, 8), False)
    assert (final.windows, final.continues) == ((8, 40), True)
    assert 0.0 in betas_of(final)


def test_auto_on_few_windows_is_an_adaptive_search():
    betas = [0.002 * number for number in range(12)]
    requests = [
        play(strategy(name, betas, 8, 15), lambda plan: 3 - plan.beta) for name in ("auto", "adaptive")
    ]
    assert requests[0] == requests[1]


@pytest.mark.parametrize(
    ("changes", "plans", "name"),
    [
        ({}, 11, "auto"),
        ({}, 3, "grid"),
        ({"betas": [0.1, 0.2, 0.3, 0.4]}, 5, "grid"),
        ({"betas": [0.1, 0.2, 0.3, 0.4], "trials": 4}, 5, "auto"),
        ({"stop_after": 2}, 3, "auto"),
        ({"recover": "refit"}, 11, "adaptive"),
        ({"recover": "refit", "offsets": [0.1]}, 22, "two-parameter"),
        ({"strategy": "race"}, 3, "race"),
    ],
)
def test_auto_is_another_strategy_where_there_is_nothing_to_narrow_down(changes, plans, name):
    assert Search.model_validate({"model": "demo", "sparsity": 0.5} | changes).strategy_for(plans) == name


def test_a_two_parameter_search_finds_the_minimum_of_a_bowl_within_its_budget():
    betas, offsets = [0.002 * number for number in range(8)], (-0.1, -0.05, 0.0, 0.05, 0.1)
    points = [(beta, offset) for beta in betas for offset in offsets]
    points.sort(key=lambda point: point != (0, 0))

    def level(plan):
        return 3 + 0.02 * (500 * plan.beta - 4) ** 2 + 40 * (plan.offset - 0.05) ** 2

    requests = play(strategy("two-parameter", points, 20, 4), level)
    tried = [plan for request in requests for plan in request.plans]
    best = min(tried, key=level)
    assert (best.beta, best.offset) == (0.008, 0.05)
    assert (requests[0].plans[0].beta, requests[0].plans[0].offset) == (0.0, 0.0)
    assert len(tried) == len(set(tried)) <= 20


def test_a_search_over_projections_moves_the_linears_of_a_kind_together_and_meets_the_target():
    layer = [
        Linear("attn.out", 10, 10, False),
        Linear("mlp.up", 10, 20, False),
        Linear("mlp.down", 20, 5, False),
    ]
    plans = tuple(SparsityPlan(beta, (0.5 - beta, 0.5 + beta)) for beta in (0.0, 0.1, 0.2))
    searched = SearchStrategy("projections", plans, 30, 4, AllocateSettings(0.5, betas=()), [layer] * 2)
    up_bears_more = [0.5, 0.35, 0.65, 0.7, 0.55, 0.85]  # by layer and linear

    def level(plan):
        every = [share for layer in plan.by_linear([[100, 200, 100]] * 2) for share in layer]
        return 3 + sum((share - wanted) ** 2 for share, wanted in zip(every, up_bears_more, strict=True))

    tried = [plan for request in play(searched, level) for plan in request.plans]
    assert [plan.beta for plan in tried] == [float(number) for number in range(len(tried))]
    assert tried[0].layers == (0.5, 0.5)
    assert {plan.layers for plan in tried if not isinstance(plan.layers[0], tuple)} == {
        plan.layers for plan in plans
    }
    for plan in tried:
        (first, second), by_layer = (
            plan.by_linear([[100, 200, 100]] * 2),
            plan.by_layer([[100, 200, 100]] * 2),
        )
        assert sum(by_layer) == pytest.approx(1.0, abs=1e-12)
        assert {round(b - a, 9) for a, b in zip(first, second, strict=True)} == {
            round(by_layer[1] - by_layer[0], 9)
        }
    assert (
        max(len(request.plans) for request in play(searched, level)) == searched.largest_request == 2 * 3 + 2
    )
    assert level(min(tried, key=level)) - 3 < 0.2 * (min(map(level, tried[:3])) - 3)
    assert len(tried) <= 30


def distance_from(ideal):
    """Return a loss that grows with the distance to the ideal sparsities."""
    return lambda plan: (
        3 + sum((layer - wanted) ** 2 for layer, wanted in zip(plan.layers, ideal, strict=True))
    )


@pytest.mark.parametrize("name", ["bayesian", "evolutionary"])
def test_a_search_over_layers_beats_uniform_and_keeps_budget_and_target(name):
    level = distance_from((0.3, 0.4, 0.6, 0.7))
    requests = play(strategy(name, (0.0,), 40, 4), level)
    tried = [plan for request in requests for plan in request.plans]
    assert len(tried) == 40
    assert [plan.beta for plan in tried] == [float(number) for number in range(40)]
    assert tried[0].layers == HALF
    assert all(sum(plan.layers) == pytest.approx(2.0, abs=1e-12) for plan in tried)
    assert min(map(level, tried)) < 3 + 0.5 * (level(tried[0]) - 3)


@pytest.mark.parametrize("name", ["bayesian", "evolutionary"])
def test_a_search_over_layers_is_replayed_from_its_trials(name):
    searched = strategy(name, (0.0,), 20, 4)
    level = distance_from((0.3, 0.4, 0.6, 0.7))
    first, second = play(searched, level), play(searched, level)
    assert first == second
    known = {plan: losses(level(plan), 4) for request in first[:2] for plan in request.plans}
    assert searched.next_lanes(known) == first[2]


def test_a_search_over_layers_with_a_pattern_tries_only_sparsities_of_the_pattern():
    requests = play(strategy("bayesian", (0.0,), 20, 4, pattern="N:8"), distance_from((0.25, 0.5, 0.5, 0.75)))
    layers = {layer for request in requests for plan in request.plans for layer in plan.layers}
    assert {8 * layer for layer in layers} <= set(range(9))


@pytest.mark.parametrize("name", ["adaptive", "bayesian", "evolutionary"])
def test_a_stopped_search_makes_the_same_requests_up_to_its_stop(name):
    searched = strategy(name, BETAS, 20, 4)

    def level(plan):
        return distance_from((0.3, 0.4, 0.6, 0.7))(plan) + (plan.beta - 0.004) ** 2

    requests = play(searched, level)
    assert len(requests) > 1
    tried = 0
    for number, request in enumerate(requests, 1):
        for stop_after in range(tried + 1, tried + len(request.plans) + 1):
            assert play(replace(searched, stop_after=stop_after), level) == requests[:number]
        tried += len(request.plans)
