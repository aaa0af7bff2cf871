"""DSA: variances by hand, the published transform and its discontinuity."""

import math
import statistics

import pytest
import torch

from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.dsa import DSA, dsa, log_variance


def test_the_variance_is_that_of_the_logarithms_and_unbiased():
    # Logarithms 0, 1, 2: mean 1, squared deviations 1 + 0 + 1 over 3 - 1.
    assert log_variance([torch.tensor([1.0, math.e, math.e**2])]) == pytest.approx(1.0)


def test_the_scores_of_all_linears_of_a_layer_are_combined():
    scores = [torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0], [0.5], [8.0]])]
    assert log_variance(scores) == pytest.approx(statistics.variance(map(math.log, [1, 4, 2, 0.5, 8])))


def test_a_score_of_zero_counts_as_one():
    assert log_variance([torch.tensor([0.0, math.e, 1.0])]) == pytest.approx(statistics.variance([0, 1, 0]))


def test_the_sign_and_the_scale_of_the_scores_do_not_matter():
    scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    assert log_variance([scores * -64]) == pytest.approx(log_variance([scores]))


def test_the_variance_does_not_depend_on_the_pieces(monkeypatch):
    scores = [torch.rand(31, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    expected = statistics.variance(
        [math.log(value) for tensor in scores for value in tensor.flatten().tolist()]
    )
    for piece in (1, 8, 1000):
        monkeypatch.setattr("layerwise.allocators.dsa.PIECE", piece)
        assert log_variance(scores) == pytest.approx(expected, rel=1e-12)
        assert log_variance(iter(scores)) == pytest.approx(expected, rel=1e-12)


def test_a_tiny_variance_far_from_zero_is_not_lost_to_rounding():
    # In float32 the squares of logarithms near 60 would hide it.
    scores = torch.tensor([1e26, 1e26 * (1 + 2**-20), 1e26 * (1 + 2**-19)], dtype=torch.float64)
    assert log_variance([scores]) == pytest.approx(2**-40, rel=1e-5)


def test_gaussian_weights_have_the_variance_of_theory():
    weight = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    assert log_variance([weight]) == pytest.approx(math.pi**2 / 8, rel=0.01)


def test_scores_are_left_unchanged():
    scores = torch.tensor([0.0, 2.0])
    log_variance([scores])
    assert scores.tolist() == [0, 2]


def test_too_few_scores_and_scores_that_are_not_finite_are_refused():
    for few in ([], [torch.empty(0)], [torch.ones(1)]):
        with pytest.raises(ValueError, match="is undefined"):
            log_variance(few)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="have no finite variance"):
            log_variance([torch.tensor([1.0, bad, 2.0])])


def test_a_larger_variance_gives_a_higher_sparsity_by_the_published_map():
    variances = [0.2, 0.9, 1.5]
    scores = [math.asin(math.atan(variance)) for variance in variances]
    densities = [1 - (score - scores[0]) / (scores[2] - scores[0]) for score in scores]
    expected = [0.7 - 0.16 * (density - sum(densities) / 3) for density in densities]
    assert dsa(variances, [5, 5, 5], 0.7) == pytest.approx(expected)
    assert expected == sorted(expected)


def test_a_variance_above_tan_1_gives_the_lowest_sparsity_as_published():
    below, beyond = math.tan(1) - 1e-6, math.tan(1) + 1e-6
    layers = dsa([1.0, below, beyond, 40.0], [1] * 4, 0.7)
    assert layers[1] == max(layers)
    assert layers[2] == layers[3] == min(layers)


def test_variances_all_above_tan_1_give_the_uniform_plan():
    assert dsa([1.6, 2.0, 3.0], [1, 2, 3], 0.7) == (0.7, 0.7, 0.7)


def test_the_weighted_mean_is_the_target_and_the_range_twice_the_spread():
    sizes = [10, 1, 400, 33]
    layers = DSA(spread=0.1).allocate([1.2, 1.3, 0.8, 1.5], sizes, 0.6)
    assert max(layers) - min(layers) == pytest.approx(0.2)
    assert weighted_mean(layers, sizes) == pytest.approx(0.6, abs=1e-12)


@pytest.mark.parametrize("variance", [-0.1, float("nan"), float("inf")])
def test_negative_and_infinite_variances_are_refused(variance):
    with pytest.raises(ValueError, match="variance of entry 1 is"):
        dsa([1.0, variance], [1, 1], 0.5)


@pytest.mark.parametrize("spread", [-0.01, 1.01, float("nan")])
def test_a_spread_outside_0_and_1_is_refused(spread):
    with pytest.raises(ValueError, match="spread of DSA"):
        DSA(spread=spread)
