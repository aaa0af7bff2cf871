"""Bayesian search: starts come first, points are within the range, and a restart proposes the same points."""

import itertools
import sys

import pytest

from layerwise.strategies.bayesian import BayesianSearch
from layerwise.strategies.trials import Trial
from tests.layerwise.played_search import proposals

UNIFORM, ATP = (0.7,) * 3, (0.6, 0.7, 0.8)


def loss_of(point):
    return sum((sparsity - wanted) ** 2 for sparsity, wanted in zip(point, (0.5, 0.75, 0.85), strict=True))


@pytest.fixture(scope="module")
def batches():
    return proposals(BayesianSearch(0.7, (UNIFORM, ATP, UNIFORM), deviation=0.2, budget=33), loss_of)


def test_the_starts_come_first_and_the_budget_is_kept(batches):
    assert batches[0] == (UNIFORM, ATP)
    assert [len(batch) for batch in batches] == [2, *[4] * 7, 3]


def test_nothing_is_proposed_twice_and_everything_is_in_range(batches):
    points = list(itertools.chain.from_iterable(batches))
    assert len(set(points)) == len(points)
    assert all(len(point) == 3 for point in points)
    assert all(0.5 <= sparsity <= 0.9 for point in points for sparsity in point)


def test_a_resumed_search_proposes_the_same_points(batches):
    trials = []
    for batch in [*batches, ()]:
        again = BayesianSearch(0.7, (UNIFORM, ATP, UNIFORM), deviation=0.2, budget=33)
        assert again.propose(tuple(trials)) == batch
        trials += [Trial(point, (loss_of(point),)) for point in batch]


def test_trials_guide_the_search(batches):
    points = list(itertools.chain.from_iterable(batches))
    at_random, guided = points[2:10], points[-15:]
    assert sum(map(loss_of, guided)) / 15 < 0.8 * sum(map(loss_of, at_random)) / 8


def test_another_seed_gives_another_search(batches):
    trials = [Trial(point, (loss_of(point),)) for point in (UNIFORM, ATP)]
    other = BayesianSearch(0.7, (UNIFORM, ATP, UNIFORM), deviation=0.2, budget=33, seed=1)
    assert not set(other.propose(trials)) & set(batches[1])


def test_the_range_is_limited_to_0_and_1():
    assert BayesianSearch(0.9, ((0.9,),), deviation=0.3).bounds == pytest.approx((0.6, 1.0))
    assert BayesianSearch(0.1, ((0.1,),), deviation=0.3).bounds == pytest.approx((0.0, 0.4))


def test_a_start_at_the_bound_is_in_range_despite_rounding():
    search = BayesianSearch(0.7, ((0.4, 1.0), (0.7 - 0.3 - 1e-16, 1.0)), deviation=0.3)
    trials = [Trial(start, (1.0,)) for start in search.starts]
    assert len(search.propose(trials)) == 4


def test_without_optuna_the_error_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    search = BayesianSearch(0.7, (UNIFORM,))
    assert search.propose([]) == (UNIFORM,)
    with pytest.raises(ImportError, match=r"pip install layerwise-pruning\[bayesian\]"):
        search.propose([Trial(UNIFORM, (1.0,))])


def test_a_start_out_of_range_is_refused():
    with pytest.raises(
        ValueError, match=r"start 1 has sparsities from 0\.6000 to 0\.8000, outside the searched range"
    ):
        BayesianSearch(0.7, (UNIFORM, ATP), deviation=0.05)


@pytest.mark.parametrize("starts", [(), ((),), (UNIFORM, (0.7,) * 4)])
def test_missing_starts_and_starts_of_different_lengths_are_refused(starts):
    with pytest.raises(ValueError, match="Give at least one"):
        BayesianSearch(0.7, starts)


@pytest.mark.parametrize("wrong", [{"target": 1.1}, {"deviation": 0.0}, {"batch": 0}, {"random_trials": 0}])
def test_invalid_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="a Bayesian search cannot have"):
        BayesianSearch(**{"target": 0.7, "starts": (UNIFORM,), **wrong})
