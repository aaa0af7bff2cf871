"""Gradual zeroing: one weight gets the masks of several lanes, in any order."""

from itertools import product

import pytest
import torch

from layerwise.models.skeleton import Linear
from layerwise.pruners.layer_pruning import GradualZeroing

LINEAR = Linear("q_proj", 1, 3, transposed=False)


def test_weights_are_removed_level_by_level():
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    zeroing = GradualZeroing(LINEAR, weight, torch.tensor([[1, 0, 2]], dtype=torch.uint8), [0, 1])
    zeroing.visit(0)
    assert weight.tolist() == [[1, 0, 3]]
    zeroing.visit(1)
    assert weight.tolist() == [[0, 0, 3]]


def test_weights_that_a_later_lane_keeps_are_restored():
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    zeroing = GradualZeroing(LINEAR, weight, torch.tensor([[1, 0, 2]], dtype=torch.uint8), [1, 0, -1])
    zeroing.visit(0)
    assert weight.tolist() == [[0, 0, 3]]
    zeroing.visit(1)
    assert weight.tolist() == [[1, 0, 3]]
    zeroing.visit(2)
    assert weight.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("transposed", [False, True])
def test_every_order_of_lanes_gives_every_lane_its_own_mask(transposed):
    levels = torch.tensor([[0, 1, 3], [2, 0, 1]], dtype=torch.uint8)
    original = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
    for targets in product([-1, 0, 1, 2], repeat=4):
        stored = original.T.clone() if transposed else original.clone()
        weight = stored.T if transposed else stored
        zeroing = GradualZeroing(LINEAR, weight, levels, targets)
        for visit, target in enumerate(targets):
            zeroing.visit(visit)
            assert torch.equal(weight, torch.where(levels.int() <= target, 0.0, original))


def test_a_weight_that_was_zero_from_the_start_is_restored_as_zero():
    weight = torch.tensor([[0.0, 2.0]])
    zeroing = GradualZeroing(LINEAR, weight, torch.tensor([[0, 1]], dtype=torch.uint8), [1, -1])
    zeroing.visit(0)
    zeroing.visit(1)
    assert weight.tolist() == [[0, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_removed_weights_are_zero_and_the_others_keep_their_bits(dtype, monkeypatch):
    monkeypatch.setattr("layerwise.pruners.layer_pruning.ZEROED_ENTRIES", 8)  # in pieces of two rows
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)
    weight = special.repeat(3, 1)
    zeroing = GradualZeroing(
        LINEAR, weight, torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 0]]).byte(), [0]
    )
    zeroing.visit(0)
    expected = special.repeat(3, 1)
    expected[[0, 1, 1, 2], [0, 1, 2, 3]] = 0
    assert torch.equal(weight.view(torch.uint8), expected.view(torch.uint8))
