"""Wanda, by hand and compared with its published definition."""

import pytest
import torch

from layerwise.calibration.statistics import InputStatistics
from layerwise.pruners.wanda import Wanda


def seen(*tokens: list[float]) -> InputStatistics:
    """Return the input statistics of tokens."""
    inputs = InputStatistics.empty(len(tokens[0]))
    inputs.add(torch.tensor(tokens).square().sum(dim=0), tokens=len(tokens))
    return inputs


def test_a_small_weight_whose_input_is_large_is_kept():
    weight = torch.tensor([[1.0, 0.1]])
    assert Wanda().removal_levels(weight, seen([1.0, 100.0]), [1]).tolist() == [[0, 1]]


def test_with_equal_inputs_the_smallest_magnitude_goes():
    weight = torch.tensor([[-1.0, 0.1]])
    assert Wanda().removal_levels(weight, seen([2.0, 2.0]), [1]).tolist() == [[1, 0]]


def test_the_norm_of_an_input_is_used_and_not_its_square():
    # Norms 5 and 1. 2 x 5 < 13 x 1, but 2 x 25 > 13 x 1.
    assert Wanda().removal_levels(
        torch.tensor([[2.0, 13.0]]), seen([3.0, 1.0], [4.0, 0.0]), [1]
    ).tolist() == [[0, 1]]


def test_rows_are_compared_with_themselves_only():
    weight = torch.tensor([[100.0, 200.0], [0.2, 0.1]])
    assert Wanda().removal_levels(weight, seen([1.0, 1.0]), [2]).tolist() == [[0, 1], [1, 0]]


def test_the_weights_of_a_zero_input_are_removed():
    weight = torch.tensor([[50.0, 1.0, 2.0], [50.0, 2.0, 1.0]])
    assert Wanda().removal_levels(weight, seen([0.0, 1.0, 1.0]), [2]).tolist() == [[0, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.625, 0.75])  # gives integer counts for 64 inputs
def test_masks_are_those_of_the_published_definition(published_wanda_mask, sparsity, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    channels = torch.rand(64, generator=generator) * 10
    sequences = [(torch.randn(32, 64, generator=generator) * channels).to(dtype) for _ in range(6)]
    inputs = InputStatistics.empty(64)
    for tokens in sequences:
        inputs.add(tokens.float().square().sum(dim=0), tokens=len(tokens))
    levels = Wanda().removal_levels(weight, inputs, [round(48 * 64 * sparsity)])
    assert torch.equal(levels == 0, published_wanda_mask(weight, sequences, sparsity))


def test_several_counts_at_once_are_the_published_masks_of_each(published_wanda_mask, monkeypatch):
    monkeypatch.setattr("layerwise.pruners.masks.RANKED_ENTRIES", 640)  # in pieces of ten rows
    generator = torch.Generator().manual_seed(1)
    weight, tokens = torch.randn(48, 64, generator=generator), torch.randn(32, 64, generator=generator)
    inputs = InputStatistics.empty(64)
    inputs.add(tokens.square().sum(dim=0), tokens=32)
    levels = Wanda().removal_levels(weight, inputs, [768, 1536, 2304])
    for level, sparsity in enumerate([0.25, 0.5, 0.75]):
        assert torch.equal(levels <= level, published_wanda_mask(weight, [tokens], sparsity))


def test_the_scale_of_the_norms_does_not_matter():
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    once, often = seen([1.0, 2.0, 3.0, 4.0]), seen(*[[1.0, 2.0, 3.0, 4.0]] * 64)
    assert torch.equal(
        Wanda().removal_levels(weight, once, [13]), Wanda().removal_levels(weight, often, [13])
    )


def test_without_a_calibration_token_the_error_gives_a_remedy():
    with pytest.raises(ValueError, match="received 0 calibration tokens.*or use Magnitude"):
        Wanda().removal_levels(torch.ones(2, 2), InputStatistics.empty(2), [1])


def test_weights_and_statistics_are_left_unchanged():
    weight, inputs = torch.tensor([[1.0, -0.1]]), seen([1.0, 2.0])
    Wanda().removal_levels(weight, inputs, [1])
    assert torch.equal(weight, torch.tensor([[1.0, -0.1]]))
    assert inputs.sum_of_squares.tolist() == [1, 4]
