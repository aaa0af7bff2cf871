"""Evolutionary search: exact totals, survival of the best plans, and the same points after a replay."""

import itertools

import pytest

from layerwise.strategies.evolutionary import EvolutionarySearch
from layerwise.strategies.trials import Trial
from tests.layerwise.played_search import proposals

SIZES = (1000, 3000, 2000, 2000, 5000)  # 13000 weights
UNIFORM = (0.6,) * 5


def toward(goal):
    """Return the squared distance to a plan as a loss."""
    return lambda point: sum((sparsity - wanted) ** 2 for sparsity, wanted in zip(point, goal, strict=True))


def removed(point, sizes=SIZES):
    counts = [sparsity * size for sparsity, size in zip(point, sizes, strict=True)]
    assert counts == pytest.approx([round(count) for count in counts], abs=1e-6)
    return tuple(map(round, counts))


GOAL = (0.2, 0.5, 0.5, 0.7, 0.74)  # 200 + 1500 + 1000 + 1400 + 3700 = 7800 weights, like the uniform plan


def test_every_plan_removes_exactly_as_many_weights_as_the_parents():
    for batch in proposals(EvolutionarySearch(SIZES, (UNIFORM, GOAL), budget=200, survivors=3), toward(GOAL)):
        for point in batch:
            assert sum(removed(point)) == 7800
            assert all(0 <= sparsity <= 1 for sparsity in point)


def test_overall_sparsities_that_are_not_an_integer_number_of_weights_per_layer_are_met():
    sizes = (101, 103, 107)  # 218 of 311 weights are closest to 70 %
    batches = proposals(EvolutionarySearch(sizes, ((0.7,) * 3,), budget=60), lambda point: point[0])
    assert batches[0] == ((0.7, 0.7, 0.7),)
    assert {sum(removed(point, sizes)) for batch in batches[1:] for point in batch} == {218}


def test_the_total_is_exact_at_the_size_of_real_layers():
    sizes = (218_103_808,) * 31 + (202_375_169,)
    batches = proposals(EvolutionarySearch(sizes, ((0.7,) * 32,), budget=40), lambda point: point[-1])
    totals = {sum(removed(point, sizes)) for batch in batches[1:] for point in batch}
    assert totals == {round(0.7 * sum(sizes))}


def test_layers_of_different_sizes_exchange_one_step():
    # A level is 0.05 * 13000 / 5 = 130 weights. A mutation makes 1 to 3 moves, usually 1.
    search = EvolutionarySearch(SIZES, (UNIFORM,), budget=101, step=0.05, offspring=100)
    uniform, single = removed(UNIFORM), 0
    for point in proposals(search, lambda point: 1.0)[1]:
        moves = [count - before for count, before in zip(removed(point), uniform, strict=True)]
        assert all(move % 130 == 0 for move in moves)
        assert 130 <= sum(move for move in moves if move > 0) <= 390
        single += sorted(moves) == [-130, 0, 0, 0, 130]
    assert single == 20  # all pairs of different layers


def test_parents_come_first_unchanged_and_once():
    batches = proposals(
        EvolutionarySearch(SIZES, (GOAL, UNIFORM, GOAL), budget=30, offspring=7), toward(GOAL)
    )
    assert batches[0] == (GOAL, UNIFORM)
    assert [len(batch) for batch in batches] == [2, 7, 7, 7, 7]


def test_the_plan_gets_closer_to_the_best_one():
    loss = toward(GOAL)
    batches = proposals(EvolutionarySearch(SIZES, (UNIFORM,), budget=300, step=0.02), loss)
    bests = [min(map(loss, batch)) for batch in batches]
    assert min(bests) < 0.02 * loss(UNIFORM)


def test_offspring_come_only_from_the_best_plan():
    search = EvolutionarySearch(SIZES, (UNIFORM, GOAL), budget=52, step=0.05, offspring=50)
    for point in proposals(search, toward(GOAL))[1]:
        changes = [abs(a - b) for a, b in zip(removed(point), removed(GOAL), strict=True)]
        assert sum(changes) <= 2 * 3 * 130


def test_each_of_several_survivors_has_offspring():
    search = EvolutionarySearch(SIZES, (UNIFORM, GOAL), budget=52, step=0.001, offspring=50, survivors=2)
    nearest = {min((UNIFORM, GOAL), key=toward(point)) for point in proposals(search, toward(GOAL))[1]}
    assert nearest == {UNIFORM, GOAL}


@pytest.mark.parametrize("budget", [1, 2, 3, 11, 20])
def test_the_budget_is_kept_and_no_plan_is_proposed_twice(budget):
    batches = proposals(EvolutionarySearch(SIZES, (UNIFORM, GOAL), budget=budget), toward(GOAL))
    plans = [removed(point) for point in itertools.chain.from_iterable(batches)]
    assert len(set(plans)) == len(plans) == budget


def test_a_small_space_is_searched_completely():
    # 4 weights are removed from two layers of 4, in steps of 1: 0 + 4, 1 + 3, 2 + 2, 3 + 1, 4 + 0.
    search = EvolutionarySearch((4, 4), ((0.5, 0.5),), budget=99, step=0.25, survivors=5)
    plans = [removed(point, (4, 4)) for batch in proposals(search, lambda point: point[0]) for point in batch]
    assert sorted(plans) == [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)]


def test_a_layer_never_loses_more_weights_than_it_has():
    # 4 weights are removed from layers of 2 and 6, in steps of 1: 0 + 4, 1 + 3, 2 + 2.
    search = EvolutionarySearch((2, 6), ((0.5, 0.5),), budget=99, step=0.25, survivors=5)
    plans = [removed(point, (2, 6)) for batch in proposals(search, sum) for point in batch]
    assert sorted(plans) == [(0, 4), (1, 3), (2, 2)]


def test_a_single_layer_has_no_other_plan():
    assert proposals(EvolutionarySearch((10,), ((0.5,),)), sum) == [((0.5,),)]


def test_a_resumed_search_proposes_the_same_points():
    loss, trials = toward(GOAL), []
    settings = dict(layer_sizes=SIZES, parents=(UNIFORM,), budget=50, survivors=2, seed=7)
    for batch in [*proposals(EvolutionarySearch(**settings), loss), ()]:
        assert EvolutionarySearch(**settings).propose(tuple(trials)) == batch
        trials += [Trial(point, (loss(point),)) for point in batch]


def test_another_seed_gives_another_search():
    first, second = (
        proposals(EvolutionarySearch(SIZES, (UNIFORM,), budget=9, seed=seed), sum)[1] for seed in (0, 1)
    )
    assert first != second


def test_parents_with_different_totals_or_layers_are_refused():
    with pytest.raises(ValueError, match="mean is not 0.6"):
        EvolutionarySearch(SIZES, (UNIFORM, (0.5,) * 5))
    with pytest.raises(ValueError):
        EvolutionarySearch(SIZES, ((0.5,) * 4,))


@pytest.mark.parametrize(
    "wrong", [{"parents": ()}, {"offspring": 0}, {"survivors": 0}, {"step": 0.0}, {"step": 1.0}]
)
def test_invalid_evolution_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="an evolutionary search cannot have"):
        EvolutionarySearch(**{"layer_sizes": SIZES, "parents": (UNIFORM,), **wrong})
