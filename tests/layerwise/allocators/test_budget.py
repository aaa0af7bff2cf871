"""Fitting to the target: the mean is exact, the bounds hold, and everything else is preserved."""

import itertools
import math
import random

import pytest

from layerwise.allocators.budget import by_importance, fitted, min_max, weighted_mean


def random_entries(dice: random.Random) -> tuple[list[float], list[int]]:
    count = dice.randint(1, 40)
    sparsities = [dice.uniform(-0.5, 1.5) for _ in range(count)]
    return sparsities, [dice.choice([1, 7, 1024, dice.randint(1, 10**9)]) for _ in range(count)]


def squared_distance(left: tuple[float, ...], right: list[float], sizes: list[int]) -> float:
    return sum(size * (a - b) ** 2 for a, b, size in zip(left, right, sizes, strict=True))


def test_the_mean_of_the_weights_is_the_target_and_the_bounds_hold():
    dice = random.Random(0)
    for _ in range(300):
        sparsities, sizes = random_entries(dice)
        target = dice.choice([0.0, 1.0, dice.uniform(0, 1)])
        result = fitted(sparsities, sizes, target)
        assert weighted_mean(result, sizes) == pytest.approx(target, abs=1e-12)
        assert 0 <= min(result) <= max(result) <= 1


def test_sparsities_that_already_fit_are_returned_bit_for_bit():
    sparsities = (0.1 + 0.2, 0.7 - 0.4, 0.3)
    assert fitted(sparsities, [5, 6, 7], 0.3) == sparsities


def test_fitting_twice_equals_fitting_once():
    dice = random.Random(1)
    for _ in range(100):
        sparsities, sizes = random_entries(dice)
        once = fitted(sparsities, sizes, 0.6)
        assert fitted(once, sizes, 0.6) == once


def test_without_clipping_all_entries_are_shifted_by_the_same_amount():
    # The mean of .2 and .5 with sizes 1 and 2 is .4.
    assert fitted([0.2, 0.5], [1, 2], 0.6) == pytest.approx([0.4, 0.7])


def test_clipping_one_entry_shifts_the_others():
    # 1.3 is clipped to 1; the other two share the amount missing to 3 x .7 = 2.1.
    assert fitted([0.3, 0.5, 1.3], [10, 10, 10], 0.7) == pytest.approx([0.45, 0.65, 1.0])


def test_a_constant_added_to_all_entries_changes_nothing():
    plain = fitted([0.1, 0.9, 1.4], [3, 2, 1], 0.5)
    assert fitted([100.1, 100.9, 101.4], [3, 2, 1], 0.5) == pytest.approx(plain)


def test_the_result_is_the_closest_one_with_this_mean():
    sparsities, sizes, target = [-0.3, 0.2, 0.9, 1.2], [1, 2, 2, 3], 0.5
    result = fitted(sparsities, sizes, target)
    steps = [step / 20 for step in range(21)]
    for first, second, third in itertools.product(steps, repeat=3):
        fourth = (target * 8 - first - 2 * second - 2 * third) / 3
        if 0 <= fourth <= 1:
            other = (first, second, third, fourth)
            assert (
                squared_distance(result, sparsities, sizes)
                <= squared_distance(other, sparsities, sizes) + 1e-9
            )


def test_equal_entries_get_exactly_the_target():
    assert fitted([0.123] * 3, [1, 5, 9], 0.7) == (0.7, 0.7, 0.7)
    assert fitted([5.0], [9], 0.1) == (0.1,)


def test_a_target_at_a_bound_sets_all_entries_to_the_bound():
    assert fitted([0.2, 0.8], [1, 3], 1.0) == pytest.approx([1, 1])
    assert fitted([0.2, 0.8], [1, 3], 0.0) == pytest.approx([0, 0])


def test_the_order_of_the_entries_is_kept():
    dice = random.Random(2)
    for _ in range(100):
        sparsities, sizes = random_entries(dice)
        result = fitted(sparsities, sizes, 0.7)
        pairs = sorted(zip(sparsities, result, strict=True))
        assert [sparsity for _, sparsity in pairs] == sorted(result)


@pytest.mark.parametrize("target", [-0.01, 1.01, float("nan")])
def test_a_target_outside_the_bounds_is_refused(target):
    with pytest.raises(ValueError, match=r"the overall sparsity is .*; it must lie in \[0, 1\]"):
        fitted([0.5, 0.6], [1, 1], target)


@pytest.mark.parametrize(
    "sparsities, sizes", [([], []), ([0.5], [1, 2]), ([0.5, 0.5], [1]), ([0.5, 0.4], [1, 0])]
)
def test_entries_without_a_value_or_without_weights_are_refused(sparsities, sizes):
    with pytest.raises(ValueError, match="values do not match entries of sizes"):
        fitted(sparsities, sizes, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_with_their_index(value):
    with pytest.raises(ValueError, match="the sparsity of entry 1 is"):
        fitted([0.5, value], [1, 1], 0.5)
    with pytest.raises(ValueError, match="the score of entry 1 is"):
        min_max([0.5, value])


def test_sparsities_that_floats_cannot_shift_to_the_target_are_refused():
    with pytest.raises(ValueError, match="too far apart to be shifted to a mean of 0.3 .*Reduce the spread"):
        fitted([-1e300, 0.5e300, 1e300], [1, 1, 1], 0.3)


def test_scores_are_scaled_to_zero_and_one():
    assert min_max([3.0, 1.0, 2.0, 5.0]) == (0.5, 0.0, 0.25, 1.0)


def test_equal_scores_all_become_zero():
    assert min_max([7.0, 7.0]) == (0.0, 0.0)
    assert min_max([]) == ()


def test_a_more_important_entry_gets_a_lower_sparsity():
    # Scaled: 0, .5, 1; their mean is .5; the range is 2 x .1 around .6.
    assert by_importance([1.0, 2.0, 3.0], [4, 4, 4], 0.6, 0.1) == pytest.approx([0.7, 0.6, 0.5])


def test_scale_and_origin_of_importances_do_not_matter():
    plain = by_importance([1.0, 2.0, 4.0], [4, 5, 6], 0.6, 0.1)
    assert by_importance([-70.0, -50.0, -10.0], [4, 5, 6], 0.6, 0.1) == pytest.approx(plain)


def test_equal_importances_give_the_uniform_plan():
    assert by_importance([3.0, 3.0, 3.0], [1, 2, 3], 0.7, 0.15) == (0.7, 0.7, 0.7)


def test_splitting_an_entry_into_parts_of_the_same_importance_changes_no_sparsity():
    whole = by_importance([1.0, 2.0, 9.0], [6, 4, 5], 0.7, 0.3)
    parts = by_importance([1.0, 1.0, 2.0, 9.0], [1, 5, 4, 5], 0.7, 0.3)
    assert parts == pytest.approx([whole[0], *whole])


def test_a_wrong_number_of_importances_is_refused():
    with pytest.raises(ValueError, match=r"2 values do not match entries of sizes \[1, 1, 1\]"):
        by_importance([1.0, 2.0], [1, 1, 1], 0.5, 0.1)
