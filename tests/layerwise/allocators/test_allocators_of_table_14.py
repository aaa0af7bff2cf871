"""Global, Erdos-Renyi and LAMP against direct computations, and their exact budgets."""

import numpy as np
import pytest
import torch

from layerwise.allocators.allocator import spread_out
from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.erdos_renyi import ErdosRenyi, ErdosRenyiPlus
from layerwise.allocators.global_threshold import (
    Global,
    count_lower,
    count_upper,
    fractions_below,
    threshold_bin,
)
from layerwise.allocators.lamp import LAMP, lamp_scores


def fractions(scores: list[torch.Tensor], target: float) -> tuple[float, ...]:
    """Both passes over the scores of all entries."""
    upper = threshold_bin(sum(count_upper([each]) for each in scores), target)
    below, within = zip(*(count_lower([each], upper) for each in scores), strict=True)
    return fractions_below(below, torch.stack(within), [each.numel() for each in scores], target)


def lowest_of_all(scores: list[torch.Tensor], target: float) -> list[float]:
    """Fraction of every entry among the lowest scores of all, by one topk."""
    every = torch.cat([each.reshape(-1) for each in scores])
    owner = torch.cat([torch.full((each.numel(),), number) for number, each in enumerate(scores)])
    removed = owner[every.topk(round(target * len(every)), largest=False).indices]
    return [int((removed == number).sum()) / each.numel() for number, each in enumerate(scores)]


def lamp_by_hand(weight: torch.Tensor) -> torch.Tensor:
    squares = [float(value) ** 2 for value in weight.reshape(-1)]
    return torch.tensor([each / sum(other for other in squares if other >= each) for each in squares])


def test_the_threshold_of_the_whole_model_is_that_of_one_topk_over_all_scores():
    scores = [torch.randn(30, 20).abs(), 3 * torch.randn(50, 40).abs(), 0.01 * torch.randn(7, 11).abs()]
    for target in (0.1, 0.5, 0.7, 0.99):
        target = (
            round(target * 2677) / 2677
        )  # a whole number of weights, so that topk removes the same number
        assert fractions(scores, target) == pytest.approx(lowest_of_all(scores, target), abs=1e-12)


def test_equal_scores_at_the_threshold_are_removed_from_all_entries_in_proportion():
    scores = [torch.ones(10), torch.ones(30), torch.tensor([0.5, 2.0])]
    # 21 of 42: 0.5 and 20 of the 40 ones.
    assert fractions(scores, 0.5) == pytest.approx((0.5, 0.5, 0.5), abs=1e-12)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_scores_that_cannot_be_compared_are_refused(wrong):
    with pytest.raises(ValueError, match="negative, infinite or NaN"):
        count_upper([torch.tensor([1.0, wrong])])


def test_lamp_scores_are_squares_over_the_sum_of_the_squares_that_are_not_smaller(monkeypatch):
    monkeypatch.setattr("layerwise.allocators.lamp.PIECE", 4)  # several pieces
    (pieces,) = [torch.cat([*lamp_scores(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))])]
    assert pieces.tolist() == pytest.approx([1.0, 4 / 13, 1 / 14, 0.0])
    weights = [torch.randn(6, 5), 5 * torch.randn(3, 9)]
    ours = [torch.cat([*lamp_scores(weight)]) for weight in weights]
    for scores, weight in zip(ours, weights, strict=True):
        np.testing.assert_allclose(
            scores.flip(0).numpy(), lamp_by_hand(weight).sort().values.numpy(), rtol=1e-6
        )
    target = 20 / 57
    by_hand = lowest_of_all([lamp_by_hand(weight) for weight in weights], target)
    assert fractions(ours, target) == pytest.approx(by_hand, abs=1e-12)


def test_erdos_renyi_densities_follow_the_formula_and_stop_at_1():
    shapes = [(4, 4), (8, 16), (32, 16)]
    sizes, connections = [16, 128, 512], [8, 24, 48]
    # Densities 1/2, 3/16, 3/32 times a factor: 656 weights, of which 20 % stay: 8 + 24 + 48 = 80 times 131.2 / 80.
    expected = [1 - min(1, 1.64 * (out + wide) / (out * wide)) for out, wide in shapes]
    assert spread_out(ErdosRenyi(), 1.0, connections, sizes, 0.8) == pytest.approx(expected)
    # With 40 % kept, the first linear would have density 1.64: it is dense, and the others share 262.4 - 16 by 24 and 48.
    others = [1 - (262.4 - 16) * each / 72 / size for each, size in zip([24, 48], [128, 512], strict=True)]
    assert spread_out(ErdosRenyi(), 1.0, connections, sizes, 0.6) == pytest.approx([0, *others])


def test_erdos_renyi_plus_keeps_the_last_linear_and_gives_the_rest_to_the_others():
    sizes, connections = [512, 128, 16], [48, 24, 8]
    kept = 0.2 * 656 - 16
    expected = [1 - kept * each / 72 / size for each, size in zip([48, 24], [512, 128], strict=True)]
    assert spread_out(ErdosRenyiPlus(), 1.0, connections, sizes, 0.8) == pytest.approx([*expected, 0])
    with pytest.raises(ValueError, match="the other linears have 144 weights, fewer than the 525 to remove"):
        spread_out(ErdosRenyiPlus(), 1.0, [8, 24, 48], [16, 128, 512], 0.8)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("allocator", [Global(), LAMP(), ErdosRenyi(), ErdosRenyiPlus()])
def test_a_strength_lies_between_uniform_and_the_method_and_meets_the_target(allocator, strength):
    sizes, scores = [512, 300, 128, 60], [0.75, 0.5, 0.75, 0.4]
    whole = spread_out(allocator, 1.0, scores, sizes, 0.674)
    part = spread_out(allocator, strength, scores, sizes, 0.674)
    assert weighted_mean(part, sizes) == pytest.approx(0.674, abs=1e-12)
    assert part == pytest.approx([0.674 + strength * (each - 0.674) for each in whole], abs=1e-9)


@pytest.mark.parametrize("allocator", [Global, LAMP, ErdosRenyi, ErdosRenyiPlus])
def test_a_strength_above_1_is_refused(allocator):
    with pytest.raises(ValueError, match=r"is 1\.5; it must lie in \[0, 1\]"):
        allocator(strength=1.5)
