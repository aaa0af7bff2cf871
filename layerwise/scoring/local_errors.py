"""Local errors: the parts of a layer's reconstruction error that are its own and that come from earlier layers.

Measures the terms of ATP's section 3 (arXiv:2502.14770). With the dense layer f, the pruned layer g, the dense model's
input X and the pruned model's input Y, the accumulated error g(Y) - f(X) is the sum of the layer's own (local) error,
g(X) - f(X), and the propagated error, g(Y) - g(X).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.models.hidden_states import batches


@dataclass(frozen=True)
class LocalErrors:
    """Parts of one layer's error in one lane. All fields but ``windows`` are squared Frobenius norms.

    Attributes:
        windows: number of scored windows, counted from the first, over which the norms are taken.
        local: norm of g(X) - f(X); by theorem 3.1 it grows with sparsity.
        arriving: norm of Y - X.
        propagated: norm of g(Y) - g(X).
        accumulated: norm of g(Y) - f(X).
        energy: norm of f(X).
    """

    windows: int
    local: float
    arriving: float
    propagated: float
    accumulated: float
    energy: float

    @property
    def factor(self) -> float | None:
        """Return the ratio of propagated to arriving error; None if the arriving error is 0.

        For a layer that is one matrix, theorem 3.2 bounds it from below by the square of the smallest singular value.
        """
        return self.propagated / self.arriving if self.arriving else None


def local_errors(
    run: Callable[[Tensor], Tensor],
    dense_input: Tensor,
    arriving: Tensor,
    output: Tensor,
    dense_output: Tensor,
) -> Tensor:
    """Run the pruned layer on the dense model's input and measure the parts of its error.

    Returns:
        The norms of ``LocalErrors`` in their order, float64, on the device of the computation: reading them waits for it.

    Args:
        run: returns the output of the pruned layer for a state of the measured windows.
        dense_input: state with X, shape ``(windows, seqlen, layout.size)``.
        arriving: squared Frobenius norm of Y - X, a scalar, because the output has overwritten Y.
        output: g(Y).
        dense_output: f(X).
    """
    device = arriving.device
    local, propagated, accumulated, energy = torch.zeros(4, dtype=torch.float64, device=device).unbind()
    for inputs, own, dense in zip(batches(dense_input), batches(output), batches(dense_output), strict=True):
        pruned, own, dense = run(inputs), own.to(device), dense.to(device)
        local += squared_difference(pruned, dense)
        propagated += squared_difference(own, pruned)
        accumulated += squared_difference(own, dense)
        energy += squared_norm(dense)
    return torch.stack([local, arriving, propagated, accumulated, energy])


def squared_difference(one: Tensor, other: Tensor) -> Tensor:
    """Return the squared Frobenius norm of the difference of two tensors of the same shape and device.

    In float32 by batches, which are added in float64. The scalar stays on the device.
    """
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    for a, b in zip(batches(one), batches(other), strict=True):
        total += squared_norm(a.float() - b.float())
    return total


def squared_norm(tensor: Tensor) -> Tensor:
    """Return the squared Frobenius norm, summed in float32, as a float64 scalar on the device of the tensor."""
    return tensor.float().square().sum().double()
