"""Conjugate gradients reach the minimum over the free entries, and stay there."""

import torch

from layerwise.pruners.conjugate_gradient import minimize


def test_steps_after_convergence_change_nothing():
    """In float32 they grew without bound, because the squared norms of the residuals are too small for it."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(112, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    gram = inputs.T @ inputs
    scale = gram.diagonal().rsqrt()
    matrix = gram * scale * scale[:, None]
    fixed = torch.rand(64, 32, generator=generator) < 0.5
    target = torch.randn(64, 32, generator=generator) @ matrix
    residual = target.masked_fill(fixed, 0)
    found = [
        minimize(torch.zeros(64, 32), residual.clone(), matrix, fixed, steps) for steps in (100, 300, 1000)
    ]
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    assert torch.equal(found[0] == 0, fixed)
    gradient = (found[0] @ matrix - target).masked_fill(fixed, 0)
    assert float(gradient.norm()) < 1e-4 * float(residual.norm())
