"""Local errors: how much of a layer's reconstruction error is its own, and how much has been handed on to it.

The terms of ATP's section 3 (arXiv:2502.14770), measured: with the dense layer f, the pruned one g, the dense model's
input X and the pruned model's input Y, the accumulated error g(Y) - f(X) is the layer's own one, g(X) - f(X), and what
it makes of the error that arrives, g(Y) - g(X).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from layerwise.models.hidden_states import batches


@dataclass(frozen=True)
class LocalErrors:
    """The parts of one layer's error in one lane. All but ``windows`` are squared Frobenius norms.

    Attributes:
        windows: over so many of the scored windows, the first ones.
        local: of g(X) - f(X); theorem 3.1: it grows with sparsity.
        arriving: of Y - X.
        propagated: of g(Y) - g(X).
        accumulated: of g(Y) - f(X).
        energy: of f(X).
    """

    windows: int
    local: float
    arriving: float
    propagated: float
    accumulated: float
    energy: float

    @property
    def factor(self) -> float | None:
        """By how much the layer multiplies the error that arrives; None if none does.

        Theorem 3.2 bounds it from below by the square of the smallest singular value of a layer that is one matrix.
        """
        return self.propagated / self.arriving if self.arriving else None


def local_errors(
    run: Callable[[Tensor], Tensor],
    dense_input: Tensor,
    arriving: float,
    output: Tensor,
    dense_output: Tensor,
) -> LocalErrors:
    """Run the pruned layer on the dense model's input, and compare.

    Args:
        run: the pruned layer, on hidden states of shape ``(windows, seqlen, hidden_size)``.
        dense_input: X, of the windows that are looked at.
        arriving: squared Frobenius norm of Y - X, which the layer's output has overwritten.
        output: g(Y).
        dense_output: f(X).
    """
    local = propagated = accumulated = energy = 0.0
    for inputs, own, dense in zip(batches(dense_input), batches(output), batches(dense_output), strict=True):
        pruned = run(inputs).to(own.device)
        local += squared_difference(pruned, dense)
        propagated += squared_difference(own, pruned)
        accumulated += squared_difference(own, dense)
        energy += dense.float().square().sum().item()
    return LocalErrors(len(dense_input), local, arriving, propagated, accumulated, energy)


def squared_difference(one: Tensor, other: Tensor) -> float:
    """Squared Frobenius norm of the difference, in float32, some windows at a time; of the same shape."""
    pairs = zip(batches(one), batches(other), strict=True)
    return sum((a.float() - b.float()).square().sum().item() for a, b in pairs)
