"""ATP's arithmetic progression keeps the target and the bounds."""

import random

import pytest

from layerwise.allocators.atp import arithmetic, largest_beta
from layerwise.allocators.beta_grid import beta_grid
from layerwise.allocators.sparsity_plan import SparsityPlan

LARGEST_BETAS = {
    12: 0.05455,
    16: 0.04,
    24: 0.02609,
    28: 0.02222,
    32: 0.01935,
    40: 0.01538,
    60: 0.01017,
    80: 0.00759,
}


def equal_layers(count: int) -> list[int]:
    return [202_375_168] * count  # LLaMA-7B


def weighted_mean(plan: SparsityPlan, layer_sizes: list[int]) -> float:
    return sum(s * size for s, size in zip(plan.layers, layer_sizes, strict=True)) / sum(layer_sizes)


@pytest.mark.parametrize("num_layers", LARGEST_BETAS)
def test_the_largest_beta_at_70_percent_is_that_of_the_paper(num_layers):
    assert largest_beta(0.7, equal_layers(num_layers)) == pytest.approx(LARGEST_BETAS[num_layers], abs=5e-6)


def test_the_largest_beta_empties_the_first_layer_below_one_half():
    largest = largest_beta(0.3, equal_layers(31))
    plan = arithmetic(0.3, largest, equal_layers(31))
    assert largest == pytest.approx(0.02)
    assert plan.layers[0] == pytest.approx(0)
    assert plan.layers[-1] == pytest.approx(0.6)


def test_the_largest_beta_fills_the_last_layer_above_one_half():
    largest = largest_beta(0.7, equal_layers(31))
    plan = arithmetic(0.7, largest, equal_layers(31))
    assert largest == pytest.approx(0.02)
    assert plan.layers[0] == pytest.approx(0.4)
    assert plan.layers[-1] == pytest.approx(1)


def test_at_one_half_both_ends_are_reached_at_once():
    plan = arithmetic(0.5, largest_beta(0.5, equal_layers(11)), equal_layers(11))
    assert plan.layers == pytest.approx([k / 10 for k in range(11)])


def test_the_papers_example_of_32_layers_at_70_percent():
    plan = arithmetic(0.7, 0.01, equal_layers(32))
    assert (plan.layers[0], plan.layers[-1]) == (pytest.approx(0.545), pytest.approx(0.855))
    steps = [b - a for a, b in zip(plan.layers, plan.layers[1:], strict=False)]
    assert steps == pytest.approx([0.01] * 31)


def test_beta_zero_is_uniform():
    assert arithmetic(0.6, 0, [5, 10, 15]).layers == pytest.approx([0.6] * 3)


def test_with_unequal_layers_the_target_is_at_the_mean_depth_of_a_weight():
    # The mean depth of sizes 1, 1, 2 is (0 + 1 + 4) / 4 = 1.25.
    plan = arithmetic(0.5, 0.1, [1, 1, 2])
    assert plan.layers == pytest.approx([0.375, 0.475, 0.575])
    assert largest_beta(0.5, [1, 1, 2]) == pytest.approx(0.5 / 1.25)  # first layer to 0
    assert largest_beta(0.9, [1, 1, 2]) == pytest.approx(0.1 / 0.75)  # last layer to 1


def test_the_weighted_mean_and_the_bounds_are_kept_for_all_sizes():
    dice = random.Random(0)
    for _ in range(300):
        layer_sizes = [dice.randint(1, 10**9) for _ in range(dice.randint(2, 90))]
        target = dice.uniform(0, 0.999)
        largest = largest_beta(target, layer_sizes)
        plan = arithmetic(target, largest * dice.choice([0, dice.random(), 1]), layer_sizes)
        assert weighted_mean(plan, layer_sizes) == pytest.approx(target, abs=1e-9)
        assert 0 <= min(plan.layers) <= max(plan.layers) <= 1
        ends = arithmetic(target, largest, layer_sizes).layers
        assert ends[0] == pytest.approx(0, abs=1e-9) or ends[-1] == pytest.approx(1)


@pytest.mark.parametrize("beta", [-1e-9, -0.01, 0.02001, 0.5, float("nan"), float("inf")])
def test_a_beta_outside_the_legal_range_is_refused_with_the_range(beta):
    with pytest.raises(ValueError, match=r"outside the legal range \[0, 0\.02000\] for sparsity 0\.7 and 31"):
        arithmetic(0.7, beta, equal_layers(31))


@pytest.mark.parametrize("target", [-0.1, 1.0, 1.5, 70, float("nan")])
def test_a_target_that_is_not_a_fraction_is_refused(target):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        arithmetic(target, 0, equal_layers(4))


def test_a_single_layer_gets_the_target():
    assert largest_beta(0.7, [10]) == 0
    assert arithmetic(0.7, 0, [10]).layers == (0.7,)
    assert beta_grid(0.7, [10]) == (0.0,)
    with pytest.raises(ValueError, match="legal range"):
        arithmetic(0.7, 0.002, [10])
