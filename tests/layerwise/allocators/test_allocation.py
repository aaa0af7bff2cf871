"""Sparsity plans: the target is kept, the bounds are kept, the budget is exact."""

import random

import pytest

from layerwise.allocators.allocation import (
    SparsityPlan,
    arithmetic,
    beta_grid,
    beta_spread,
    largest_beta,
    removed_per_linear,
)

# Number of grid points beside 0 for each depth, at S = .3, .4, ... .9, computed by hand from the bounds of ATP.
TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GRID_SIZES = {
    12: (27, 36, 45, 36, 27, 18, 9),
    16: (20, 26, 33, 26, 20, 13, 6),
    24: (13, 17, 21, 17, 13, 8, 4),
    28: (11, 14, 18, 14, 11, 7, 3),
    32: (9, 12, 16, 12, 9, 6, 3),
    40: (7, 10, 12, 10, 7, 5, 2),
    60: (5, 6, 8, 6, 5, 3, 1),
    80: (3, 5, 6, 5, 3, 2, 1),
}
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


def random_layers(dice: random.Random) -> list[list[int]]:
    """Sizes of the linears of some layers, of different numbers and sizes."""
    return [[dice.randint(1, 5000) for _ in range(dice.randint(1, 7))] for _ in range(dice.randint(2, 40))]


@pytest.mark.parametrize("num_layers", GRID_SIZES)
def test_the_grid_is_that_of_the_paper(num_layers):
    for target, size in zip(TARGETS, GRID_SIZES[num_layers], strict=True):
        grid = beta_grid(target, equal_layers(num_layers))
        assert grid == pytest.approx([0.002 * k for k in range(size + 1)])


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


def test_layers_of_unequal_size_turn_about_the_mean_depth_of_a_weight():
    # The mean depth of sizes 1, 1, 2 is (0 + 1 + 4) / 4 = 1.25.
    plan = arithmetic(0.5, 0.1, [1, 1, 2])
    assert plan.layers == pytest.approx([0.375, 0.475, 0.575])
    assert largest_beta(0.5, [1, 1, 2]) == pytest.approx(0.5 / 1.25)  # first layer to 0
    assert largest_beta(0.9, [1, 1, 2]) == pytest.approx(0.1 / 0.75)  # last layer to 1


def test_the_weighted_mean_and_the_bounds_are_kept_whatever_the_sizes():
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
def test_a_beta_outside_of_the_legal_range_is_refused_with_the_range(beta):
    with pytest.raises(
        ValueError, match=r"outside of the legal range \[0, 0\.02000\] for sparsity 0\.7 and 31"
    ):
        arithmetic(0.7, beta, equal_layers(31))


@pytest.mark.parametrize("target", [-0.1, 1.0, 1.5, 70, float("nan")])
def test_a_target_that_is_no_fraction_is_refused(target):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        arithmetic(target, 0, equal_layers(4))


def test_a_plan_with_a_layer_outside_of_the_bounds_cannot_be_made():
    with pytest.raises(ValueError, match=r"layer 1 would get sparsity 1\.1000, outside \[0, 1\]"):
        SparsityPlan(0.3, (0.8, 1.1))
    with pytest.raises(ValueError, match="layer 0 would get sparsity -0"):
        SparsityPlan(0.3, (-0.1, 0.2))


def test_a_single_layer_has_the_target_and_no_slope():
    assert largest_beta(0.7, [10]) == 0
    assert arithmetic(0.7, 0, [10]).layers == (0.7,)
    assert beta_grid(0.7, [10]) == (0.0,)
    with pytest.raises(ValueError, match="legal range"):
        arithmetic(0.7, 0.002, [10])


@pytest.mark.parametrize(
    "num_layers, target, points", [(26, 0.8, 8), (41, 0.8, 5), (21, 0.9, 5), (81, 0.92, 1)]
)
def test_a_bound_that_is_a_grid_point_belongs_to_the_grid_whatever_floating_point_makes_of_it(
    num_layers, target, points
):
    # 2 x .2 / 25 = .016, 2 x .2 / 40 = .01, 2 x .1 / 20 = .01, 2 x .08 / 80 = .002: all multiples of .002.
    grid = beta_grid(target, equal_layers(num_layers))
    assert grid == pytest.approx([0.002 * k for k in range(points + 1)])
    assert arithmetic(target, grid[-1], equal_layers(num_layers)).layers[-1] == pytest.approx(1)


SHAPES = [(n, s) for n in (2, 3, 31, 32, 80, 91) for s in (0.0, 0.1, 0.3, 0.5, 0.65, 0.7, 0.9, 0.99)]


@pytest.mark.parametrize("step", [0.0007, 0.001, 0.002, 0.005])
def test_every_beta_of_a_grid_is_legal_and_uniform_comes_first(step):
    for num_layers, target in SHAPES:
        betas = beta_grid(target, equal_layers(num_layers), step)
        assert betas[0] == 0
        for beta in betas:
            arithmetic(target, beta, equal_layers(num_layers))


def test_a_step_that_divides_the_legal_range_gives_a_legal_grid_with_its_upper_end():
    for num_layers, target in SHAPES:
        layer_sizes = equal_layers(num_layers)
        for parts in (1, 3, 7):
            if largest := largest_beta(target, layer_sizes):
                betas = beta_grid(target, layer_sizes, largest / parts)
                assert len(betas) == parts + 1
                for beta in betas:
                    arithmetic(target, beta, layer_sizes)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_every_beta_of_a_spread_is_legal_and_uniform_comes_first(count):
    for num_layers, target in SHAPES:
        betas = beta_spread(target, equal_layers(num_layers), count)
        assert betas[0] == 0
        for beta in betas:
            arithmetic(target, beta, equal_layers(num_layers))


def test_a_spread_covers_the_legal_range_evenly_with_both_ends():
    assert beta_spread(0.7, equal_layers(31), 4) == pytest.approx([0, 0.005, 0.01, 0.015, 0.02])


def test_a_spread_of_one_is_uniform_and_the_largest():
    assert beta_spread(0.7, equal_layers(31), 1) == pytest.approx([0, 0.02])


@pytest.mark.parametrize("target, num_layers", [(0.7, 1), (0.0, 32)])
def test_a_spread_over_an_empty_range_is_uniform_alone(target, num_layers):
    assert beta_spread(target, equal_layers(num_layers), 6) == (0.0,)


def test_steps_and_counts_that_make_no_grid_are_refused():
    with pytest.raises(ValueError, match="step of the beta grid is 0; it must be positive"):
        beta_grid(0.7, equal_layers(4), step=0)
    with pytest.raises(ValueError, match="0 betas were asked for"):
        beta_spread(0.7, equal_layers(4), 0)


def test_the_budget_of_a_small_plan_by_hand():
    # Ideals 1.2 2.4 | 2.4 1.2: floors leave 7 - 6 = 1 unit, which goes to the first of the largest remainders.
    plan = SparsityPlan(0.0, (0.6, 0.6))
    assert removed_per_linear(plan, 0.6, [[2, 4], [4, 2]]) == ((1, 3), (2, 1))


def test_of_equal_remainders_the_earlier_linear_comes_first():
    plan = SparsityPlan(0.0, (0.5, 0.5))
    assert removed_per_linear(plan, 0.5, [[3, 3], [3, 3]]) == ((2, 2), (1, 1))


def test_whole_ideals_are_met_whatever_floating_point_makes_of_them():
    plan = SparsityPlan(0.0, (0.3, 0.7 - 0.4, 0.1 * 3))
    assert removed_per_linear(plan, 0.3, [[10, 1000], [10, 1000], [10, 1000]]) == ((3, 300),) * 3


def test_the_budget_is_exact_and_every_linear_is_within_one_weight_of_its_ideal():
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


def test_realised_sparsity_of_a_real_model_is_the_target():
    # LLaMA-3-8B: grouped keys and values, 32 layers.
    linear_sizes = [[4096 * 4096, 4096 * 1024, 4096 * 1024, 4096 * 4096] + [4096 * 14336] * 3] * 32
    total = sum(map(sum, linear_sizes))
    for target in TARGETS:
        for beta in beta_grid(target, [sum(sizes) for sizes in linear_sizes]):
            plan = arithmetic(target, beta, [sum(sizes) for sizes in linear_sizes])
            removed = removed_per_linear(plan, target, linear_sizes)
            assert abs(sum(map(sum, removed)) / total - target) <= 1 / total


def test_realised_sparsity_of_a_tiny_model_is_within_one_in_ten_thousand():
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
