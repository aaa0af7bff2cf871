"""Sparsity plans: sparsities stay within the bounds, and the numbers of removed weights are exact."""

import random

import pytest

from layerwise.allocators.atp import arithmetic, largest_beta
from layerwise.allocators.beta_grid import beta_grid
from layerwise.allocators.sparsity_plan import SparsityPlan, removed_per_linear

TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def random_layers(dice: random.Random) -> list[list[int]]:
    """Return the sizes of the linears of some layers, with different numbers and sizes."""
    return [[dice.randint(1, 5000) for _ in range(dice.randint(1, 7))] for _ in range(dice.randint(2, 40))]


def test_a_plan_with_a_layer_outside_the_bounds_is_refused():
    with pytest.raises(ValueError, match=r"layer 1 would get sparsity 1\.1000, outside \[0, 1\]"):
        SparsityPlan(0.3, (0.8, 1.1))
    with pytest.raises(ValueError, match="layer 0 would get sparsity -0"):
        SparsityPlan(0.3, (-0.1, 0.2))


def test_the_counts_of_a_small_plan_by_hand():
    # Exact counts 1.2 2.4 | 2.4 1.2: rounding down leaves 7 - 6 = 1 weight, for the first of the largest remainders.
    plan = SparsityPlan(0.0, (0.6, 0.6))
    assert removed_per_linear(plan, 0.6, [[2, 4], [4, 2]]) == ((1, 3), (2, 1))


def test_of_equal_remainders_the_earlier_linear_is_rounded_up():
    plan = SparsityPlan(0.0, (0.5, 0.5))
    assert removed_per_linear(plan, 0.5, [[3, 3], [3, 3]]) == ((2, 2), (1, 1))


def test_integer_counts_are_met_despite_rounding():
    plan = SparsityPlan(0.0, (0.3, 0.7 - 0.4, 0.1 * 3))
    assert removed_per_linear(plan, 0.3, [[10, 1000], [10, 1000], [10, 1000]]) == ((3, 300),) * 3


def test_the_total_is_exact_and_every_linear_is_within_one_weight_of_the_plan():
    dice = random.Random(1)
    for _ in range(300):
        linear_sizes = random_layers(dice)
        layer_sizes = [sum(sizes) for sizes in linear_sizes]
        target = dice.choice([0.5, 0.7, dice.uniform(0, 0.999)])
        beta = largest_beta(target, layer_sizes) * dice.choice([0, dice.random(), 1])
        plan = arithmetic(target, beta, layer_sizes)
        removed = removed_per_linear(plan, target, linear_sizes)
        assert sum(map(sum, removed)) == round(target * sum(layer_sizes))
        for sparsity, counts, sizes in zip(plan.layers, removed, linear_sizes, strict=True):
            assert len(counts) == len(sizes)
            for count, size in zip(counts, sizes, strict=True):
                assert 0 <= count <= size
                assert abs(count - sparsity * size) <= 1 + 1e-6
        assert removed == removed_per_linear(plan, target, linear_sizes)


def test_realized_sparsity_of_a_real_model_is_the_target():
    # LLaMA-3-8B: grouped keys and values, 32 layers.
    linear_sizes = [[4096 * 4096, 4096 * 1024, 4096 * 1024, 4096 * 4096] + [4096 * 14336] * 3] * 32
    total = sum(map(sum, linear_sizes))
    for target in TARGETS:
        for beta in beta_grid(target, [sum(sizes) for sizes in linear_sizes]):
            plan = arithmetic(target, beta, [sum(sizes) for sizes in linear_sizes])
            removed = removed_per_linear(plan, target, linear_sizes)
            assert abs(sum(map(sum, removed)) / total - target) <= 1 / total


def test_realized_sparsity_of_a_tiny_model_is_within_one_in_ten_thousand():
    linear_sizes = [[32 * 32] * 4 + [32 * 48] * 3] * 2
    total = sum(map(sum, linear_sizes))
    for target in TARGETS:
        plan = arithmetic(target, 0.01, [total // 2] * 2)
        assert abs(sum(map(sum, removed_per_linear(plan, target, linear_sizes))) / total - target) <= 1e-4


def test_a_plan_for_other_sizes_is_refused():
    plan = arithmetic(0.5, 0.4, [1000, 1000, 1000])
    with pytest.raises(ValueError, match="mean is not 0.5: .* Build the plan for the sizes of this model"):
        removed_per_linear(plan, 0.5, [[10], [10], [1000]])


def test_a_plan_for_another_number_of_layers_is_refused():
    with pytest.raises(ValueError):  # noqa: PT011
        removed_per_linear(arithmetic(0.5, 0, [10, 10]), 0.5, [[10], [10], [10]])
