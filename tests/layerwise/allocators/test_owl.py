"""OWL: outliers counted by hand, and lower sparsity for layers with more outliers."""

import pytest
import torch

from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.owl import OWL, outlier_percentage, owl


def test_outliers_exceed_a_multiple_of_the_mean_of_all_linears_together():
    # The mean of the ten scores is 2; only 11 is above 5 x 2. Within its own linear it would be one of two.
    scores = [torch.tensor([[1.0, 11.0]]), torch.ones(2, 4)]
    assert outlier_percentage(scores, threshold=5.0) == pytest.approx(10)


def test_a_score_at_the_bound_is_not_an_outlier():
    # The mean is 2: 8 is four times the mean.
    assert outlier_percentage([torch.tensor([8.0, 0.0, 0.0, 0.0])], threshold=4.0) == 0
    assert outlier_percentage([torch.tensor([8.0, 0.0, 0.0, 0.0])], threshold=3.9) == 25


def test_the_scale_of_the_scores_does_not_matter():
    scores = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)).pow(4)
    assert outlier_percentage([scores * 1024]) == outlier_percentage([scores]) > 0


def test_outliers_do_not_depend_on_the_pieces(monkeypatch):
    scores = [torch.rand(30, 7, generator=torch.Generator().manual_seed(seed)).pow(4) for seed in (0, 1)]
    joined = torch.cat([tensor.flatten() for tensor in scores]).double()
    expected = 100 * (joined > 3 * joined.mean()).double().mean().item()
    monkeypatch.setattr("layerwise.allocators.owl.PIECE", 8)
    assert outlier_percentage(scores, 3.0) == pytest.approx(expected)
    assert outlier_percentage((tensor for tensor in scores), 3.0) == pytest.approx(expected)
    assert outlier_percentage([tensor.T for tensor in scores], 3.0) == pytest.approx(expected)


def test_a_layer_of_zeros_has_no_outliers():
    assert outlier_percentage([torch.zeros(3, 3)]) == 0


def test_zero_scores_and_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="no scores for a layer"):
        outlier_percentage([torch.empty(0, 4)])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mean of the 2 scores of a layer is"):
            outlier_percentage([torch.tensor([1.0, bad])])


def test_more_outliers_give_a_lower_sparsity():
    # Scaled: 0, .25, 1 with mean 5/12; the range is 2 x .12.
    expected = [0.7 - 0.24 * (u - 5 / 12) for u in (0, 0.25, 1)]
    assert owl([1.0, 2.0, 5.0], [7, 7, 7], 0.7, spread=0.12) == pytest.approx(expected)


def test_sparsities_differ_by_twice_the_spread_and_keep_the_weighted_mean():
    sizes = [10, 1, 400, 33]
    layers = OWL(spread=0.08).allocate([3.0, 0.5, 9.0, 1.0], sizes, 0.7)
    assert max(layers) - min(layers) == pytest.approx(0.16)
    assert weighted_mean(layers, sizes) == pytest.approx(0.7, abs=1e-12)


def test_no_layer_loses_more_than_all_its_weights():
    layers = OWL(spread=0.3).allocate([0.0, 0.0, 0.0, 1.0], [5, 5, 5, 5], 0.9)
    assert layers == pytest.approx([1.0, 1.0, 1.0, 0.6])


def test_equal_outliers_and_spread_0_are_uniform():
    assert OWL().allocate([2.0, 2.0], [1, 9], 0.7) == (0.7, 0.7)
    assert OWL(spread=0.0).allocate([1.0, 2.0], [1, 9], 0.7) == (0.7, 0.7)


@pytest.mark.parametrize("threshold", [0.0, -5.0, float("inf"), float("nan")])
def test_a_threshold_that_cannot_find_outliers_is_refused(threshold):
    with pytest.raises(ValueError, match="outlier threshold of OWL"):
        OWL(threshold=threshold)


@pytest.mark.parametrize("spread", [-0.01, 1.01, float("nan")])
def test_a_spread_outside_0_and_1_is_refused(spread):
    with pytest.raises(ValueError, match="spread of OWL"):
        OWL(spread=spread)
