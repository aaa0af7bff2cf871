"""Magnitude pruning compares all weights of the matrix and ignores the inputs."""

import torch

from layerwise.calibration.statistics import InputStatistics
from layerwise.pruners.magnitude import Magnitude


def test_the_smallest_weights_of_the_matrix_are_removed_first_regardless_of_sign():
    weight = torch.tensor([[0.1, -0.2, 0.3], [-4.0, 5.0, -6.0]])
    levels = Magnitude().removal_levels(weight, InputStatistics.empty(3), [2, 4])
    assert levels.tolist() == [[0, 0, 1], [1, 2, 2]]


def test_inputs_are_ignored():
    weight = torch.tensor([[1.0, 0.1]])
    inputs = InputStatistics.empty(2)
    inputs.add(torch.tensor([1.0, 1e8]), tokens=1)
    assert Magnitude().removal_levels(weight, inputs, [1]).tolist() == [[1, 0]]


def test_counts_are_exact_in_bfloat16_where_many_weights_are_equal():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    counts = [1, 1000, 2048, 2049, 4095]
    levels = Magnitude().removal_levels(weight, InputStatistics.empty(64), counts)
    assert len(weight.abs().unique()) < 1000
    assert [int((levels <= index).sum()) for index in range(5)] == counts


def test_every_kept_weight_is_at_least_as_large_as_every_removed_one():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    removed = Magnitude().removal_levels(weight, InputStatistics.empty(32), [300]) == 0
    assert weight[removed].abs().max() < weight[~removed].abs().min()


def test_weights_are_left_unchanged():
    weight = torch.tensor([[1.0, -0.1]])
    Magnitude().removal_levels(weight, InputStatistics.empty(2), [1])
    assert torch.equal(weight, torch.tensor([[1.0, -0.1]]))
