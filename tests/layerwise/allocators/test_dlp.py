"""DLP: exact medians without sorting, and higher sparsity for larger scores."""

import pytest
import torch

from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.dlp import DLP, dlp, typical_score


def sorted_scores(scores: list[torch.Tensor]) -> list[float]:
    return sorted(value for tensor in scores for value in tensor.flatten().tolist())


def test_the_median_is_that_of_all_linears_together():
    scores = [torch.tensor([[1.0, 9.0]]), torch.tensor([[2.0], [3.0], [8.0]])]
    assert typical_score(scores) == 3


def test_the_median_of_an_even_number_is_the_lower_middle_one():
    assert typical_score([torch.tensor([4.0, 1.0, 3.0, 2.0])]) == 2
    assert typical_score([torch.tensor([5.0])]) == 5


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
@pytest.mark.parametrize("kind", ["spread", "close", "ties", "tiny"])
def test_the_median_equals_that_of_sorting(monkeypatch, count, kind):
    generator = torch.Generator().manual_seed(count)
    uniform = torch.rand(count, generator=generator)
    values = {
        "spread": torch.exp(40 * uniform - 20),
        "close": 1 + uniform * 2**-8,  # all upper halves of the bits are equal
        "ties": (uniform * 3).floor(),
        "tiny": uniform * 1e-42,  # subnormal numbers
    }[kind]
    monkeypatch.setattr("layerwise.allocators.dlp.PIECE", 7)
    scores = list(values.split(13))
    assert typical_score(scores) == sorted_scores(scores)[(count - 1) // 2]
    assert typical_score(iter(scores)) == typical_score(scores)


def test_the_median_of_zeros_of_either_sign_is_zero():
    assert typical_score([torch.tensor([-0.0, 0.0, -0.0, 1.0])]) == 0


def test_scores_in_narrow_dtypes_keep_their_value():
    scores = torch.tensor([0.5, 3.0, 1.5], dtype=torch.bfloat16)
    assert typical_score([scores]) == 1.5
    assert typical_score([scores], "mean") == pytest.approx(5 / 3)


def test_the_mean_is_not_rounded_to_float32():
    scores = torch.full((3000,), 1.0)
    scores[0] = 2.0**26
    assert typical_score([scores], "mean") == (2**26 + 2999) / 3000


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("statistic", ["median", "mean"])
def test_scores_that_wanda_cannot_give_are_refused(statistic, bad):
    with pytest.raises(ValueError, match="negative, infinite or NaN"):
        typical_score([torch.tensor([1.0, 2.0, bad])], statistic)


def test_zero_scores_and_an_unknown_statistic_are_refused():
    with pytest.raises(ValueError, match="no scores for a layer"):
        typical_score([torch.empty(0)])
    with pytest.raises(ValueError, match="no statistic 'mode'"):
        typical_score([torch.ones(2)], "mode")


def test_sparsities_are_those_of_the_published_formula():
    scores, target, alpha = [1.0, 4.0, 2.0, 9.0], 0.7, 0.15
    importances = [1 - score / sum(scores) for score in scores]
    scaled = [(i - min(importances)) / (max(importances) - min(importances)) for i in importances]
    deviations = [2 * alpha * value for value in scaled]
    expected = [target + sum(deviations) / 4 - deviation for deviation in deviations]
    assert dlp(scores, [8] * 4, target, alpha) == pytest.approx(expected)


def test_a_larger_typical_score_gives_a_higher_sparsity():
    layers = DLP().allocate([0.1, 0.4, 0.2], [1, 1, 1], 0.7)
    assert layers[0] < layers[2] < layers[1]
    assert layers[1] - layers[0] == pytest.approx(0.3)


def test_the_weighted_mean_is_the_target_and_nothing_exceeds_1():
    sizes = [10, 1, 400, 33]
    layers = DLP(alpha=0.4).allocate([1.2, 1.3, 0.8, 9.0], sizes, 0.9)
    assert weighted_mean(layers, sizes) == pytest.approx(0.9, abs=1e-12)
    assert max(layers) == 1


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_an_alpha_outside_0_and_1_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha of DLP"):
        DLP(alpha=alpha)
