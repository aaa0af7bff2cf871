"""Depth schedules: published values, exact means, legal at every sparsity."""

import math
import random

import pytest

from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.depth_schedules import Erf, Power, erf_schedule, power_schedule

# Relative depths in the table of values: layers 1, 9, 17, 25 and 32 of 32.
BLOCKS = (0, 8, 16, 24, 31)


def equal_layers(count: int) -> list[int]:
    return [202_375_168] * count  # LLaMA-7B


def local_error(sparsity: float) -> float:
    """Return the energy fraction of the smallest Gaussian weights, s - 2 t phi(t), with t found by bisection."""
    low, high = 0.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) < sparsity else (low, middle)
    return sparsity - 2 * low * math.exp(-low * low / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(
    "log_amplification, values",
    [
        (0.02, (0.625, 0.664, 0.703, 0.741, 0.774)),
        (0.043, (0.543, 0.623, 0.706, 0.787, 0.853)),
        (0.09, (0.400, 0.547, 0.718, 0.877, 0.966)),
    ],
)
def test_the_erf_schedule_has_the_derived_values(log_amplification, values):
    layers = erf_schedule(0.7, log_amplification, equal_layers(32))
    assert [layers[block] for block in BLOCKS] == pytest.approx(values, abs=6e-4)


def test_the_erf_schedule_minimizes_the_error_at_the_last_layer():
    amplification = 1.3
    layers = erf_schedule(0.6, math.log(amplification), [1] * 4)

    def last_error(plan: list[float]) -> float:
        return sum(
            amplification ** (3 - index) * local_error(sparsity) for index, sparsity in enumerate(plan)
        )

    least = last_error(list(layers))
    dice = random.Random(0)
    for _ in range(200):
        moves = [dice.gauss(0, 0.02) for _ in range(4)]
        plan = [sparsity + move - sum(moves) / 4 for sparsity, move in zip(layers, moves, strict=True)]
        assert least <= last_error(plan) + 1e-12


def test_the_erf_schedule_is_close_to_atps_line_at_70_percent():
    # ln c = .043 corresponds to .01 per layer.
    line = [0.7 + 0.01 * (index - 15.5) for index in range(32)]
    assert erf_schedule(0.7, 0.043, equal_layers(32)) == pytest.approx(line, abs=0.006)


def test_amplification_0_and_spread_0_are_exactly_uniform():
    for target in (0.1, 0.3, 0.7):
        assert erf_schedule(target, 0.0, [3, 4, 5]) == (target,) * 3
        assert power_schedule(target, 0.0, 0.8, [3, 4, 5]) == (target,) * 3


def test_every_schedule_meets_the_target_within_the_bounds_for_all_sizes():
    dice = random.Random(1)
    for _ in range(150):
        sizes = [dice.randint(1, 10**9) for _ in range(dice.randint(1, 80))]
        target = dice.choice([0.0, 1.0, 0.02, 0.98, dice.random()])
        for layers in (
            erf_schedule(target, dice.uniform(-1, 1), sizes),
            power_schedule(target, dice.uniform(-2, 2), dice.uniform(0.1, 3), sizes),
        ):
            assert len(layers) == len(sizes)
            assert weighted_mean(layers, sizes) == pytest.approx(target, abs=1e-12)
            assert 0 <= min(layers) <= max(layers) <= 1


@pytest.mark.parametrize("target", [0.05, 0.5, 0.95])
def test_positive_values_rise_with_depth_and_negative_ones_fall(target):
    sizes = [5, 1, 7, 3]
    for rising in (erf_schedule(target, 0.3, sizes), power_schedule(target, 0.04, 0.5, sizes)):
        assert list(rising) == sorted(rising)
        assert rising[0] < target < rising[-1]
    for falling in (erf_schedule(target, -0.3, sizes), power_schedule(target, -0.04, 0.5, sizes)):
        assert list(falling) == sorted(falling, reverse=True)
        assert falling[-1] < target < falling[0]


def test_a_falling_erf_schedule_is_the_reversed_rising_one():
    assert erf_schedule(0.6, -0.2, [1, 2, 3])[::-1] == pytest.approx(erf_schedule(0.6, 0.2, [3, 2, 1]))


@pytest.mark.parametrize("log_amplification", [-300.0, -20.0, 20.0, 300.0])
def test_the_steepest_erf_schedules_remove_whole_layers(log_amplification):
    layers = erf_schedule(0.5, log_amplification, [1] * 10)
    ends = layers if log_amplification > 0 else layers[::-1]
    assert ends == pytest.approx([0.0] * 5 + [1.0] * 5, abs=1e-2)
    assert weighted_mean(layers, [1] * 10) == pytest.approx(0.5, abs=1e-12)


def test_a_power_schedule_by_hand():
    # x is 0, 1/4, 1/2, 3/4, 1; squared, their mean is 30/80 = .375.
    squares = power_schedule(0.6, 0.16, 2.0, [1] * 5)
    assert squares == pytest.approx([0.6 + 0.16 * (x - 0.375) for x in (0, 0.0625, 0.25, 0.5625, 1)])


def test_exponent_1_is_atps_line():
    assert power_schedule(0.7, 0.31, 1.0, [1] * 32) == pytest.approx([0.545 + 0.01 * i for i in range(32)])


def test_a_power_schedule_uses_the_weighted_mean():
    # The mean of 0 and 1 with sizes 1 and 3 is .75.
    assert power_schedule(0.5, 0.4, 1.0, [1, 3]) == pytest.approx([0.2, 0.6])


def test_a_power_schedule_that_leaves_the_bounds_is_clipped_and_still_exact():
    # The line runs from .4 to 1.2. It is clipped at 1, and the first two layers get the missing amount.
    assert power_schedule(0.8, 0.8, 1.0, [1] * 3) == pytest.approx([0.5, 0.9, 1.0])


def test_a_single_layer_gets_the_target():
    assert erf_schedule(0.7, 0.1, [9]) == (0.7,)
    assert power_schedule(0.7, 0.3, 0.8, [9]) == pytest.approx((0.7,))


@pytest.mark.parametrize("method", [Erf(0.05), Power(0.2, 0.8)])
def test_zero_layers_and_a_target_that_is_not_a_fraction_are_refused(method):
    with pytest.raises(ValueError, match="values do not match entries"):
        method.allocate([], [], 0.5)
    for target in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="the overall sparsity is"):
            method.allocate([], [1, 1], target)


def test_the_allocators_return_their_schedules():
    sizes = [4, 5, 6]
    assert Erf(log_amplification=0.04).allocate([], sizes, 0.6) == erf_schedule(0.6, 0.04, sizes)
    assert Power(spread=0.3, exponent=0.8).allocate([], sizes, 0.6) == power_schedule(0.6, 0.3, 0.8, sizes)


def test_invalid_schedule_parameters_are_refused():
    with pytest.raises(ValueError, match="log_amplification is nan"):
        Erf(math.nan)
    with pytest.raises(ValueError, match="spread is inf"):
        Power(math.inf, 1.0)
    for exponent in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="exponent of the power schedule is"):
            Power(0.3, exponent)
