"""All allocators through one interface: strength 0 is uniform, and every strength meets the target."""

import pytest

from layerwise.allocators.allocator import Given, spread_out, strength_of
from layerwise.allocators.alpha_pruning import AlphaPruning
from layerwise.allocators.atp import ATP
from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.depth_schedules import Erf, Power
from layerwise.allocators.dlp import DLP
from layerwise.allocators.dsa import DSA
from layerwise.allocators.lsa import LSA
from layerwise.allocators.owl import OWL

SIZES = [100, 300, 200, 400]
SCORES = [0.9, 0.4, 0.7, 0.1]
ALL = [ATP(), OWL(), AlphaPruning(), DSA(), DLP(), LSA(), Erf(0.05), Power(0.3, 0.5)]


@pytest.mark.parametrize("allocator", ALL, ids=lambda allocator: allocator.method)
def test_at_strength_0_everything_gets_the_target(allocator):
    assert spread_out(allocator, 0.0, SCORES, SIZES, 0.6) == (0.6,) * 4


@pytest.mark.parametrize("strength", [0.01, 0.1, 0.2])
@pytest.mark.parametrize("allocator", ALL, ids=lambda allocator: allocator.method)
def test_the_target_is_met_at_every_strength_and_entries_differ_more_at_a_higher_one(allocator, strength):
    wide, narrow = (spread_out(allocator, each, SCORES, SIZES, 0.6) for each in (strength, strength / 2))
    assert weighted_mean(wide, SIZES) == pytest.approx(0.6, abs=1e-12)
    assert max(wide) - min(wide) > max(narrow) - min(narrow) > 0


@pytest.mark.parametrize(
    ("allocator", "strength"), [(ATP(), None), (OWL(spread=0.12), 0.12), (AlphaPruning(epsilon=0.2), 0.2)]
)
def test_the_strength_of_every_allocator_is_known(allocator, strength):
    assert strength_of(allocator) == strength


@pytest.mark.parametrize("allocator", ALL[1:], ids=lambda allocator: allocator.method)
def test_the_own_strength_gives_the_result_of_the_allocator_itself(allocator):
    own = strength_of(allocator)
    assert spread_out(allocator, own, SCORES, SIZES, 0.6) == allocator.allocate(SCORES, SIZES, 0.6)


def test_given_sparsities_are_used_unchanged():
    assert spread_out(Given((0.5, 0.75)), 1.0, [], [100, 100], 0.625) == (0.5, 0.75)


def test_given_sparsities_that_miss_the_target_are_refused_with_their_mean():
    with pytest.raises(ValueError, match=r"weighted mean 0\.625000, but the overall sparsity is 0\.6"):
        spread_out(Given((0.5, 0.75)), 1.0, [], [100, 100], 0.6)


def test_given_sparsities_for_another_depth_are_refused():
    with pytest.raises(ValueError, match="2 sparsities were given, but the model has 3 decoder layers"):
        spread_out(Given((0.5, 0.75)), 1.0, [], [100, 100, 100], 0.6)
