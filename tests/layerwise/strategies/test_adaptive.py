"""Adaptive search: the exact minimum of every curve that falls and then rises, with few trials."""

import itertools
import math

import pytest

from layerwise.strategies.adaptive import AdaptiveSearch
from layerwise.strategies.trials import Trial

# Perplexity by beta of SmolLM2-135M with Wanda, at three sparsities.
AT_50 = {0: 58.35, 0.002: 56.94, 0.004: 55.84, 0.006: 56.94, 0.008: 57.84, 0.012: 62.71, 0.016: 72.98}
AT_60 = {0: 49.77, 0.0046: 41.85, 0.0092: 43.36, 0.0138: 52.5, 0.0184: 72.39, 0.023: 126.2, 0.0276: 3662}
AT_70 = {0: 655, 0.004: 432, 0.008: 318, 0.01: 297, 0.012: 307, 0.014: 328}


def grid(count: int) -> tuple[float, ...]:
    return tuple(0.002 * index for index in range(count))


def proposals(search: AdaptiveSearch, losses) -> list[list[int]]:
    """Return the indices of the candidates tried on this curve, by proposal."""
    trials, rounds = [], []
    while points := search.propose(trials):
        rounds.append([search.candidates.index(beta) for (beta,) in points])
        trials += [Trial((search.candidates[index],), (losses[index],)) for index in rounds[-1]]
    return rounds


def tried(search: AdaptiveSearch, losses) -> list[int]:
    return list(itertools.chain.from_iterable(proposals(search, losses)))


def falling_then_rising(count: int):
    """Yield all orders of ``count`` different losses that fall and then rise; each rank is on the left or the right."""
    for sides in itertools.product((False, True), repeat=count - 1):
        left = [rank for rank, side in enumerate(sides, 1) if side]
        right = [rank for rank, side in enumerate(sides, 1) if not side]
        yield [*reversed(left), 0, *right]


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize(
    "height", [float, lambda rank: 1.5**rank, lambda rank: 700.0 + rank if rank > 3 else 3 + rank]
)
def test_the_minimum_of_every_curve_that_falls_and_then_rises_is_found(count, height):
    search = AdaptiveSearch(grid(count), budget=count)
    for ranks in falling_then_rising(count):
        losses = [height(rank) for rank in ranks]
        indices = tried(search, losses)
        assert ranks[min(indices, key=losses.__getitem__)] == 0
        assert len(set(indices)) == len(indices)


def test_the_search_ends_when_both_neighbours_of_the_best_are_tried():
    for ranks in falling_then_rising(9):
        indices, best = tried(AdaptiveSearch(grid(9), budget=9), ranks), ranks.index(0)
        assert {best - 1, best, best + 1} & set(range(9)) <= set(indices)


@pytest.mark.parametrize("budget", range(1, 8))
def test_the_budget_is_kept_uniform_is_tried_and_nothing_is_tried_twice_for_all_losses(budget):
    for losses in itertools.product((1.0, 2.0, 700.0), repeat=7):
        indices = tried(AdaptiveSearch(grid(7), budget), losses)
        assert len(set(indices)) == len(indices) <= budget
        assert 0 in indices


def test_a_dozen_candidates_take_about_five_trials():
    costs = []
    for count in range(10, 16):
        for best in range(count):
            losses = [3 + 0.02 * (index - best + 0.3) ** 2 for index in range(count)]
            indices = tried(AdaptiveSearch(grid(count), budget=99), losses)
            assert min(indices, key=losses.__getitem__) == losses.index(min(losses))
            costs.append(len(indices))
    assert sum(costs) / len(costs) < 5.6
    assert max(costs) <= 8


@pytest.mark.parametrize("curve, allowed", [(AT_50, 5), (AT_60, 4), (AT_70, 5)])
def test_the_best_beta_of_measured_curves_is_found_with_few_trials(curve, allowed):
    betas, losses = tuple(curve), [math.log(perplexity) for perplexity in curve.values()]
    indices = tried(AdaptiveSearch(betas, budget=allowed), losses)
    assert min(indices, key=losses.__getitem__) == losses.index(min(losses))


def test_the_far_end_is_not_tried_when_the_loss_rises_before_it():
    losses = [math.log(perplexity) for perplexity in AT_60.values()]
    assert max(tried(AdaptiveSearch(tuple(AT_60), budget=7), losses)) == 3


def test_the_far_end_is_found_when_the_loss_falls_all_the_way():
    indices = tried(AdaptiveSearch(grid(13)), [5 - 0.1 * index for index in range(13)])
    assert indices[:3] == [0, 3, 6]
    assert indices[-1] == 12
    assert len(indices) == 6


def test_the_minimum_of_a_parabola_is_found_and_confirmed_in_one_more_proposal():
    losses = [(index - 5) ** 2 for index in range(13)]
    assert [sorted(indices) for indices in proposals(AdaptiveSearch(grid(13)), losses)] == [
        [0, 3, 6],
        [5],
        [4],
    ]


def test_a_minimum_at_the_best_trial_is_confirmed_on_both_sides_at_once():
    losses = [(index - 3) ** 2 for index in range(13)]
    assert [sorted(indices) for indices in proposals(AdaptiveSearch(grid(13)), losses)] == [[0, 3, 6], [2, 4]]


def test_candidates_need_not_be_evenly_spaced():
    betas = (0.0, 0.001, 0.004, 0.005, 0.011, 0.02, 0.03)
    for best in betas:
        losses = [1000 * (beta - best) ** 2 for beta in betas]
        assert betas[min(tried(AdaptiveSearch(betas, 7), losses), key=losses.__getitem__)] == best


def test_a_flat_curve_ends_with_uniform_as_the_best():
    indices = tried(AdaptiveSearch(grid(12), budget=12), [3.0] * 12)
    assert {0, 1} <= set(indices)
    assert len(indices) < 12


def test_uniform_as_the_only_candidate_is_a_valid_search():
    assert tried(AdaptiveSearch((0.0,)), [1.0]) == [0]


def test_a_resumed_search_proposes_the_same_points():
    losses = [math.log(perplexity) for perplexity in AT_70.values()]
    search, trials = AdaptiveSearch(tuple(AT_70)), []
    for indices in [*proposals(search, losses), []]:
        again = AdaptiveSearch(tuple(AT_70)).propose(tuple(trials))
        assert again == tuple((search.candidates[index],) for index in indices)
        trials += [Trial((search.candidates[index],), (losses[index],)) for index in indices]


@pytest.mark.parametrize("candidates", [(), (0.0, 0.0), (0.0, 0.2, 0.1), (0.0, math.nan), (0.0, math.inf)])
def test_candidates_that_are_not_ascending_are_refused(candidates):
    with pytest.raises(ValueError, match="candidates are .* must be finite, strictly ascending"):
        AdaptiveSearch(candidates)


def test_candidates_without_uniform_and_an_empty_budget_are_refused():
    with pytest.raises(ValueError, match=r"first candidate is 0\.1; it must be 0"):
        AdaptiveSearch((0.1, 0.2))
    with pytest.raises(ValueError, match="budget is 0 trials"):
        AdaptiveSearch((0.0, 0.1), budget=0)
