"""Conjugate gradients for many least-squares problems with one matrix and a mask for each."""

import torch
from torch import Tensor

# A row whose residual has become smaller than rounding errors of float32, relative to the first one, takes no more
# steps: they would be noise, which grows without bound once the squared norms are too small for float32.
SMALLEST_RESIDUAL = 2.0**-23


def minimize(solution: Tensor, residual: Tensor, matrix: Tensor, fixed: Tensor, steps: int) -> Tensor:
    """Take conjugate-gradient steps towards the minimum of ``x matrix x^T / 2 - b x^T`` over the free entries of ``x``.

    Each row is an independent problem with its own step lengths, and takes ``steps`` steps or fewer until it has
    converged. The quadratic form does not increase in any step, and reaches its minimum after as many steps as a row has
    free entries. There is no preconditioner; scale the problem so that the matrix has a constant diagonal.

    Args:
        solution: start, shape ``(rows, columns)``, float32; changed in place and returned.
        residual: ``b - solution matrix``, zero at the fixed entries; same shape, changed in place.
        matrix: positive semidefinite, shape ``(columns, columns)``.
        fixed: mask, same shape as ``solution``; marked entries do not change.
        steps: number of steps, each with one product with the matrix.
    """
    direction = residual.clone()
    squared_norm = residual.square().sum(dim=1, keepdim=True)
    negligible = squared_norm * SMALLEST_RESIDUAL**2
    for _ in range(steps):
        product = (direction @ matrix).masked_fill_(fixed, 0)
        step = _quotient(squared_norm, (direction * product).sum(dim=1, keepdim=True))
        solution.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        previous, squared_norm = squared_norm, residual.square().sum(dim=1, keepdim=True)
        squared_norm.masked_fill_(squared_norm <= negligible, 0)
        direction.mul_(_quotient(squared_norm, previous)).add_(residual)
    return solution


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, or zero where the denominator is not positive (such a row cannot be improved)."""
    return torch.where(denominator > 0, numerator / denominator, 0)
