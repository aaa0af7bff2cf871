"""Beta grids contain uniform and only legal betas, and match the grid of the paper."""

import pytest

from layerwise.allocators.atp import arithmetic, largest_beta
from layerwise.allocators.beta_grid import beta_grid, beta_spread

# Number of grid points except 0 for each depth, at S = .3, .4, ... .9, computed by hand from the bounds of ATP.
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

SHAPES = [(n, s) for n in (2, 3, 31, 32, 80, 91) for s in (0.0, 0.1, 0.3, 0.5, 0.65, 0.7, 0.9, 0.99)]


def equal_layers(count: int) -> list[int]:
    return [202_375_168] * count  # LLaMA-7B


@pytest.mark.parametrize("num_layers", GRID_SIZES)
def test_the_grid_is_the_one_of_the_paper(num_layers):
    for target, size in zip(TARGETS, GRID_SIZES[num_layers], strict=True):
        grid = beta_grid(target, equal_layers(num_layers))
        assert grid == pytest.approx([0.002 * k for k in range(size + 1)])


@pytest.mark.parametrize(
    "num_layers, target, points", [(26, 0.8, 8), (41, 0.8, 5), (21, 0.9, 5), (81, 0.92, 1)]
)
def test_an_upper_bound_on_the_grid_is_included_despite_rounding(num_layers, target, points):
    # 2 x .2 / 25 = .016, 2 x .2 / 40 = .01, 2 x .1 / 20 = .01, 2 x .08 / 80 = .002: all multiples of .002.
    grid = beta_grid(target, equal_layers(num_layers))
    assert grid == pytest.approx([0.002 * k for k in range(points + 1)])
    assert arithmetic(target, grid[-1], equal_layers(num_layers)).layers[-1] == pytest.approx(1)


@pytest.mark.parametrize("step", [0.0007, 0.001, 0.002, 0.005])
def test_every_beta_of_a_grid_is_legal_and_uniform_comes_first(step):
    for num_layers, target in SHAPES:
        betas = beta_grid(target, equal_layers(num_layers), step)
        assert betas[0] == 0
        for beta in betas:
            arithmetic(target, beta, equal_layers(num_layers))


def test_a_step_that_divides_the_legal_range_includes_its_upper_end():
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
def test_a_spread_over_an_empty_range_contains_only_uniform(target, num_layers):
    assert beta_spread(target, equal_layers(num_layers), 6) == (0.0,)


def test_invalid_steps_and_counts_are_refused():
    with pytest.raises(ValueError, match="step of the beta grid is 0; it must be positive"):
        beta_grid(0.7, equal_layers(4), step=0)
    with pytest.raises(ValueError, match="0 betas were requested"):
        beta_spread(0.7, equal_layers(4), 0)
