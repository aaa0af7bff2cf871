"""Distillation: the loss against torch's own computation, and the optimizer that keeps zeros."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

from layerwise.recovery.distillation import (
    MaskedAdamW,
    in_stored_dtype,
    kl_and_gradient,
    rate_factor,
    window_losses,
    window_order,
)
from layerwise.scoring.divergence import kl_per_token

HEAD = nn.Linear(4, 7).requires_grad_(False)


def test_the_loss_is_the_divergence_of_the_two_distributions():
    student, teacher = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    expected = kl_divergence(Categorical(logits=teacher), Categorical(logits=student))
    assert torch.allclose(kl_per_token(student, teacher), expected, atol=1e-6)
    assert kl_per_token(teacher, teacher).abs().max() < 1e-6
    masked = torch.full((3, 5, 2), -torch.inf)  # tokens that the model never gives
    with_masked = [torch.cat((logits, masked), dim=-1).requires_grad_() for logits in (student, teacher)]
    divergences = kl_per_token(*with_masked)
    assert torch.allclose(divergences, expected, atol=1e-6)
    divergences.sum().backward()
    assert with_masked[0].grad.isfinite().all()


def test_loss_and_gradient_do_not_depend_on_the_number_of_positions_at_a_time(monkeypatch):
    states, teacher = torch.randn(2, 11, 4, requires_grad=True), torch.randn(2, 11, 4)
    loss = kl_per_token(HEAD(states), HEAD(teacher)).mean()
    (expected,) = torch.autograd.grad(loss, states)
    for positions in (3, 256):
        monkeypatch.setattr("layerwise.recovery.distillation.LOSS_POSITIONS", positions)
        found, gradient = kl_and_gradient(HEAD, states, teacher)
        assert found == pytest.approx(loss.item(), rel=1e-5)
        assert torch.allclose(gradient, expected, atol=1e-7)


def test_the_cross_entropy_of_a_window_is_that_of_its_next_tokens(monkeypatch):
    monkeypatch.setattr("layerwise.recovery.distillation.LOSS_POSITIONS", 3)
    states, input_ids = torch.randn(1, 7, 4), torch.randint(7, (1, 7))
    losses = window_losses(HEAD, states, states, input_ids)
    expected = nn.functional.cross_entropy(HEAD(states)[0, :-1], input_ids[0, 1:])
    assert losses.cross_entropy == pytest.approx(expected.item(), rel=1e-6)
    assert losses.kl == pytest.approx(0.0, abs=1e-6)


def test_only_the_positions_before_counted_tokens_are_in_the_losses(monkeypatch):
    monkeypatch.setattr("layerwise.recovery.distillation.LOSS_POSITIONS", 3)
    states, teacher = torch.randn(1, 7, 4, requires_grad=True), torch.randn(1, 7, 4)
    input_ids = torch.randint(7, (1, 7))
    counted = torch.tensor([[True, False, True, True, False, False, False]])
    before = [1, 2]  # positions of the predictions of the tokens 2 and 3; the first token is not predicted
    divergences = kl_per_token(HEAD(states), HEAD(teacher))[0, before]
    (expected,) = torch.autograd.grad(divergences.mean(), states)
    found, gradient = kl_and_gradient(HEAD, states, teacher, counted)
    assert found == pytest.approx(divergences.mean().item(), rel=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-7)
    losses = window_losses(HEAD, states, teacher, input_ids, counted)
    assert losses.kl == pytest.approx(divergences.mean().item(), rel=1e-5)
    cross_entropy = nn.functional.cross_entropy(HEAD(states)[0, before], input_ids[0, [2, 3]])
    assert losses.cross_entropy == pytest.approx(cross_entropy.item(), rel=1e-5)
    everything = torch.ones_like(counted)
    assert window_losses(HEAD, states, teacher, input_ids, everything) == window_losses(
        HEAD, states, teacher, input_ids
    )
    whole, all_ones = (
        kl_and_gradient(HEAD, states, teacher),
        kl_and_gradient(HEAD, states, teacher, everything),
    )
    assert whole[0] == all_ones[0]
    assert torch.equal(whole[1], all_ones[1])


def test_pruned_weights_stay_zero_and_kept_weights_move_by_the_relative_rate():
    small = nn.Parameter(torch.tensor([[0.0, 0.1], [-0.1, 0.0]]))
    large = nn.Parameter(torch.tensor([[0.0, 10.0], [-10.0, 0.0]]))
    optimizer = MaskedAdamW({"small": small, "large": large}, learning_rate=0.01)
    for weight in (small, large):
        weight.grad = torch.ones(2, 2)
    optimizer.step(factor=1.0)
    # The first step of Adam is the rate, in the direction of the gradient.
    assert torch.allclose(small, torch.tensor([[0.0, 0.099], [-0.101, 0.0]]))
    assert torch.allclose(large, torch.tensor([[0.0, 9.9], [-10.1, 0.0]]))
    assert (small == 0).tolist() == (large == 0).tolist() == [[True, False], [False, True]]


def test_an_expert_that_no_token_reaches_has_a_gradient_of_zero():
    """A class that skips the expert gives it no gradient at all."""
    reached, skipped, zero = (nn.Parameter(torch.tensor([[0.0, 1.0]])) for _ in range(3))
    names = ("experts.0.up.weight", "experts.1.up.weight", "experts.2.up.weight")
    optimizer = MaskedAdamW(dict(zip(names, (reached, skipped, zero), strict=True)), 0.01)
    for gradients in ((1.0, None, 0.0), (1.0, 1.0, 1.0)):
        for weight, gradient in zip((reached, skipped, zero), gradients, strict=True):
            weight.grad = None if gradient is None else torch.full_like(weight, gradient)
        optimizer.step(factor=1.0)
    assert torch.equal(skipped, zero)
    assert not torch.equal(skipped, reached)
    with pytest.raises(AssertionError, match="the loss depends on q_proj.weight"):
        MaskedAdamW({"q_proj.weight": nn.Parameter(torch.ones(1, 2))}, 0.01).step(factor=1.0)


def test_the_gradient_of_pruned_weights_does_not_count_in_its_norm():
    weight = nn.Parameter(torch.tensor([[0.0, 1.0]]))
    optimizer = MaskedAdamW({"weight": weight}, 0.01)
    weight.grad = torch.tensor([[100.0, 3.0]])
    assert optimizer.step(1.0) == pytest.approx(3.0)


def test_a_kept_weight_that_would_be_rounded_to_zero_keeps_its_value():
    before = torch.tensor([0.0, 0.5, 0.25], dtype=torch.float16)
    stored = in_stored_dtype(torch.tensor([1e-3, 1e-9, 0.75]), before)
    assert stored.dtype == torch.float16
    assert stored.tolist() == [0.0, 0.5, 0.75]


def test_the_rate_rises_for_a_tenth_of_the_steps_and_falls_to_almost_zero():
    rates = [rate_factor(step, 20) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert rate_factor(0, 1) == 1.0


def test_all_windows_are_used_before_one_is_repeated_and_more_steps_only_add():
    order = window_order(5, 12, seed=3)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:7] == window_order(5, 7, seed=3)
    assert order != window_order(5, 12, seed=4)
    assert math.ceil(len(order) / 5) == 3
