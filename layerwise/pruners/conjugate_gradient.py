"""Conjugate gradients for the weights that stay, one independent least-squares problem per output row."""

import torch
from torch import Tensor


def refit(change: Tensor, hessian: Tensor, removed: Tensor, steps: int) -> Tensor:
    """Lower ``trace(change hessian change^T)`` by moving the entries that are not removed.

    Every row takes the same number of steps, with step lengths of its own: how ALPS refines the weights once it has
    found which to keep (arXiv:2406.07831). The quadratic form never rises from one step to the next, and is least
    after as many steps as a row has free entries. There is no preconditioner: a Hessian of unit diagonal is its own.

    Args:
        change: from the dense to the sparse weight, shape ``(out_features, in_features)``, float32; left unchanged.
        hessian: positive semidefinite, shape ``(in_features, in_features)``.
        removed: mask, shape of ``change``; what it marks stays as it is.
        steps: number of products with the Hessian, beside a first one.

    Returns:
        The new change, same shape.
    """
    change = change.clone()
    residual = (change @ hessian).neg_().masked_fill_(removed, 0)
    direction = residual.clone()
    squared_norm = residual.square().sum(dim=1, keepdim=True)
    for _ in range(steps):
        product = (direction @ hessian).masked_fill_(removed, 0)
        step = _quotient(squared_norm, (direction * product).sum(dim=1, keepdim=True))
        change.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        previous, squared_norm = squared_norm, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(_quotient(squared_norm, previous)).add_(residual)
    return change


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero where the denominator is not positive: such a row has nothing left to gain."""
    return torch.where(denominator > 0, numerator / denominator, 0)
