"""Projection search: first beta, then rounds of probes and steps over the offsets of all kinds."""

import itertools
import random

import pytest

from layerwise.scoring.perplexity import DIVERGED
from layerwise.strategies.projections import BETA_TRIALS, STEPS, ProjectionSearch
from layerwise.strategies.trials import Point, Trial
from tests.layerwise.played_search import proposals, tried

BETAS = tuple(0.002 * index for index in range(8))
SHARES = (0.1, 0.03, 0.03, 0.09, 0.25, 0.25, 0.25)
IDEAL = (0.03, -0.04, -0.1, -0.02, 0.0, -0.01, 0.02)
NOWHERE = (0.0,) * 7


def bowl(beta: float, ideal=IDEAL, twist: float = 0.0):
    """Return a loss with its minimum at this beta and these offsets; ``twist`` couples neighboring kinds."""

    def loss(point):
        apart = [offset - wanted for offset, wanted in zip(point[1:], ideal, strict=True)]
        together = sum(a * b for a, b in itertools.pairwise(apart))
        return (
            3 + 0.01 * ((point[0] - beta) / 0.002) ** 2 + 20 * (sum(a * a for a in apart) + twist * together)
        )

    return loss


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("twist", [0.0, 0.8, -0.8])
def test_most_of_the_distance_from_the_best_beta_to_the_minimum_is_covered(beta, twist):
    loss = bowl(beta, twist=twist)
    points = tried(ProjectionSearch(BETAS, SHARES, 200), loss)
    assert len(points) == len(set(points)) <= 200
    best = min(points, key=loss)
    assert best[0] == beta
    assert loss(best) - 3 < 0.2 * (loss((beta, *NOWHERE)) - 3)


def test_one_round_is_two_probes_for_each_kind_and_the_steps():
    batches = proposals(ProjectionSearch(BETAS, SHARES, 30), bowl(0.006))
    along_beta = [batch for batch in batches if all(point[1:] == NOWHERE for point in batch)]
    assert 0.0 in {point[0] for point in along_beta[0]}
    assert sum(map(len, along_beta)) <= BETA_TRIALS
    probes, steps = batches[len(along_beta) :]
    assert set(probes) >= {
        (0.006, *(side if other == kind else 0.0 for other in range(7)))
        for kind in range(7)
        for side in (0.05, -0.05)
    }
    assert len(steps) == len(STEPS)
    assert steps[0][1] > 0 > steps[0][3], "the first kind loses more, the third less"


def test_a_flat_loss_ends_with_the_probes():
    batches = proposals(ProjectionSearch(BETAS, SHARES, 200), lambda point: 3.0)
    assert all(abs(offset) in (0, 0.05) for batch in batches for point in batch for offset in point[1:])


def test_a_better_neighboring_beta_is_used():
    """With offsets, another beta can be the best."""
    wanted = bowl(0.008, (0.1, -0.1, -0.1, 0.0, 0.0, 0.0, 0.0))

    def loss(point):
        return wanted(point) if any(point[1:]) else bowl(0.006)(point)

    best = min(tried(ProjectionSearch(BETAS, SHARES, 200), loss), key=loss)
    assert best[0] == 0.008


@pytest.mark.parametrize("kinds", [2, 3, 7])
@pytest.mark.parametrize("seed", range(40))
def test_for_all_losses_nothing_is_tried_twice_and_the_budget_is_kept(kinds, seed):
    dice, shares = random.Random(seed), (1 / kinds,) * kinds
    search = ProjectionSearch(BETAS, shares, dice.randint(24, 200))
    losses: dict[Point, float] = {}

    def loss(point):
        rough = dice.choice([1.0, 0.01]) * dice.random()  # every point gets a fixed random loss
        return losses.setdefault(point, 3 + 10 * sum(abs(each - 0.1) for each in point) + rough)

    batches = proposals(search, loss)
    points = [point for batch in batches for point in batch]
    assert len(points) == len(set(points)) <= search.budget
    assert max(map(len, batches)) <= search.most_together
    assert any(any(point[1:]) for point in points), "there was room for a round"


def test_a_failed_probe_gives_a_direction_and_does_not_hide_the_other_slopes():
    whole = bowl(0.006)

    def loss(point):
        return DIVERGED if point[0] == 0.006 and point[1] == -0.05 else whole(point)

    step = proposals(ProjectionSearch(BETAS, SHARES, 30), loss)[-1][0]
    assert step[1] > 0, "away from the side that failed"
    assert step[3] < step[5] - 0.2 * step[1], "the third kind still bears less than the fifth"


def test_proposals_depend_only_on_the_trials():
    search, loss, trials = ProjectionSearch(BETAS, SHARES, 60), bowl(0.006), []
    for batch in [*proposals(search, loss), ()]:
        assert ProjectionSearch(BETAS, SHARES, 60).propose(tuple(trials)) == batch
        trials += [Trial(point, (loss(point),)) for point in batch]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": (0.002, 0.004)}, "it must be 0, the uniform plan"),
        ({"betas": (0.0, 0.004, 0.002)}, "must be finite, strictly ascending"),
        ({"shares": (1.0,)}, "at least two are needed"),
        ({"shares": (0.5, 0.6)}, "with the sum 1"),
        ({"budget": 0}, "the budget is 0 trials"),
        ({"budget": 25}, r"with 7 kinds .* round takes 20, .* 8 betas. Give at least 26"),
        ({"probe": 0.5}, "probe distance of the offsets is 0.5"),
    ],
)
def test_invalid_search_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ProjectionSearch(**({"betas": BETAS, "shares": SHARES, "budget": 30} | changes))
