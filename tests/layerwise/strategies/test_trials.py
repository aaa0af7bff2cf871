"""Comparison of trials that were scored on different windows."""

import math

import pytest

from layerwise.strategies.trials import Trial, comparable_losses, losses_by_index, seed_of_proposal


def test_the_loss_is_the_mean_over_the_windows():
    assert Trial((0.1,), (1.0, 2.0, 6.0)).loss == 3.0


def test_the_mean_does_not_depend_on_the_order_of_the_windows():
    assert Trial((0.1,), (1e16, 1.0, -1e16)).loss == pytest.approx(1 / 3)


@pytest.mark.parametrize("losses", [(), (1.0, math.nan), (math.inf,)])
def test_a_trial_without_a_finite_loss_is_refused(losses):
    with pytest.raises(
        ValueError, match=r"trial of \(0\.1,\) has the losses .* replace a loss that is not finite by"
    ):
        Trial((0.1,), losses)


def test_trials_on_the_same_windows_are_compared_by_their_means():
    trials = [Trial((0.0,), (1.0, 3.0)), Trial((0.1,), (4.0, 5.0))]
    assert comparable_losses(trials) == [2.0, 4.5]


def test_a_trial_that_was_beaten_on_easy_windows_does_not_become_the_best():
    # The first window is easy: the beaten trial's own mean, 1.5, is below the winner's 2.0. It was worse by 0.5 there.
    winner, beaten = Trial((0.0,), (1.0, 3.0)), Trial((0.1,), (1.5,))
    assert comparable_losses([winner, beaten]) == [2.0, 2.5]


def test_the_best_trial_with_the_most_windows_is_the_reference():
    worse, best, short = Trial((0.0,), (5.0, 5.0)), Trial((0.1,), (1.0, 3.0)), Trial((0.2,), (2.0,))
    assert comparable_losses([worse, best, short]) == [5.0, 2.0, 3.0]


def test_zero_trials_have_zero_losses():
    assert comparable_losses([]) == []


def test_losses_are_listed_by_the_index_of_the_point():
    trials = [Trial((0.2,), (5.0,)), Trial((0.0,), (4.0,))]
    assert losses_by_index(trials, [(0.0,), (0.1,), (0.2,)]) == {2: 5.0, 0: 4.0}


def test_a_trial_of_a_point_that_is_not_a_candidate_is_refused():
    with pytest.raises(ValueError, match=r"point \(0\.3,\) was tried, but it is not among the 2 candidates"):
        losses_by_index([Trial((0.3,), (1.0,))], [(0.0,), (0.1,)])


def test_seeds_depend_only_on_the_seed_and_the_number_of_trials():
    trials = [Trial((float(number),), (1.0,)) for number in range(20)]
    seeds = {seed_of_proposal(seed, trials[:count]) for seed in range(20) for count in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seed_of_proposal(1, trials) == seed_of_proposal(1, [Trial((9.0,), (7.0,))] * 20)
