"""Inputs that stand in for those of experts that few tokens reach; sums to be checked by eye."""

import torch

from layerwise.calibration.few_tokens import moments_to_prune_by, statistics_to_prune_by
from layerwise.calibration.gram import InputGram
from layerwise.calibration.statistics import InputStatistics

UP, GATE, DOWN, SHARED = "up_proj", "gate_proj", "down_proj", "mlp.shared_experts.up_proj"


def statistics(*values: float, tokens: int) -> InputStatistics:
    return InputStatistics(torch.tensor(values, dtype=torch.float64), tokens)


def test_an_expert_with_few_tokens_gets_the_sum_over_all_experts_for_the_same_linear():
    collected = {
        f"mlp.experts.0.{UP}": statistics(100.0, 400.0, tokens=96),
        f"mlp.experts.1.{UP}": statistics(28.0, 112.0, tokens=32),
        f"mlp.experts.2.{UP}": statistics(0.0, 0.0, tokens=0),
        f"mlp.experts.0.{DOWN}": statistics(1.0, tokens=96),
        f"mlp.experts.2.{DOWN}": statistics(0.0, tokens=0),
        SHARED: statistics(5.0, tokens=3),
    }
    used = statistics_to_prune_by(collected)
    # 128 squares and 512 squares of 128 tokens, scaled to 64 tokens.
    for expert in (1, 2):
        assert used[f"mlp.experts.{expert}.{UP}"].sum_of_squares.tolist() == [64.0, 256.0]
        assert used[f"mlp.experts.{expert}.{UP}"].tokens == 64
    assert used[f"mlp.experts.2.{DOWN}"].sum_of_squares.tolist() == [64 / 96]
    for name in (f"mlp.experts.0.{UP}", f"mlp.experts.0.{DOWN}", SHARED):
        assert used[name] is collected[name]
    assert list(used) == list(collected)


def test_statistics_of_a_layer_that_no_token_reaches_stay_without_tokens():
    collected = {f"mlp.experts.{expert}.{UP}": statistics(0.0, tokens=0) for expert in range(2)}
    assert {each.tokens for each in statistics_to_prune_by(collected).values()} == {0}


def test_experts_with_fewer_tokens_than_inputs_share_the_sum_of_all_second_moments():
    grams = [InputGram(torch.eye(80) * (expert + 1), tokens) for expert, tokens in enumerate((100, 79, 0))]
    collected = {f"mlp.experts.{e}.{name}": gram for e, gram in enumerate(grams) for name in (GATE, UP)}
    used = moments_to_prune_by(collected)
    assert used[f"mlp.experts.0.{GATE}"] is used[f"mlp.experts.0.{UP}"] is grams[0]
    pooled = used[f"mlp.experts.1.{GATE}"]
    assert all(used[f"mlp.experts.{expert}.{name}"] is pooled for expert in (1, 2) for name in (GATE, UP))
    assert torch.allclose(pooled.gram, torch.eye(80) * 6 * 80 / 179)
    assert pooled.tokens == 80
