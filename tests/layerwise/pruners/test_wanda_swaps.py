"""Wanda's masks improved by swaps: fewer errors, the same counts, untouched survivors."""

import pytest
import torch

from layerwise.calibration.statistics import InputStatistics
from layerwise.pruners.wanda import Wanda
from layerwise.pruners.wanda_swaps import WandaSwaps


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator)
    inputs = torch.randn(400, 32, generator=generator) @ mixing
    return torch.randn(24, 32, generator=generator), inputs


def error(weight, pruned, inputs):
    return float((inputs @ (weight - pruned).T).square().sum())


def wanda(weight, inputs, count, group=None):
    seen = InputStatistics.empty(32)
    seen.add(inputs.square().sum(dim=0), tokens=len(inputs))
    return weight.masked_fill(Wanda().removal_levels(weight, seen, [count], group) == 0, 0)


@pytest.mark.parametrize(("count", "group"), [(384, None), (400, None), (537, None), (384, 4), (384, 8)])
def test_swaps_lower_the_error_of_wandas_mask_and_change_neither_counts_nor_survivors(layer, count, group):
    weight, inputs = layer
    plain = wanda(weight, inputs, count, group)
    swapped = WandaSwaps().prune(weight, inputs.T @ inputs, count, group)
    assert error(weight, swapped, inputs) < 0.9 * error(weight, plain, inputs)
    kept = swapped != 0
    assert torch.equal(swapped[kept], weight[kept])
    assert torch.equal(kept.sum(dim=1), (plain != 0).sum(dim=1))
    if group:
        assert set(kept.reshape(-1, group).sum(dim=1).tolist()) == {group // 2}


def test_without_rounds_it_is_wanda(layer):
    weight, inputs = layer
    assert torch.equal(WandaSwaps(rounds=0).prune(weight, inputs.T @ inputs, 300), wanda(weight, inputs, 300))


def test_uncorrelated_inputs_leave_nothing_to_swap():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    assert WandaSwaps().prune(weight, torch.eye(4), 2).tolist() == [[3.0, 0.0, 2.0, 0.0]]


def test_two_inputs_that_always_cancel_are_removed_together():
    # x1 = -x2: removing both weights of 1 changes nothing, although each alone matters more than the others.
    gram = torch.tensor([[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    gram += torch.diag(torch.tensor([0.0, 0.0, 8.0]))
    pruned = WandaSwaps().prune(torch.tensor([[1.0, 1.0, 0.5]]), gram, 2)
    assert pruned.tolist() == [[0.0, 0.0, 0.5]]
