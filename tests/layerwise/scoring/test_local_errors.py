"""Local errors on a layer of one matrix, where every part can be computed by hand."""

import pytest
import torch

from layerwise.scoring.local_errors import LocalErrors, local_errors, squared_difference


def states(*values):
    """Return hidden states of one window with one token."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1)


def test_the_parts_of_an_error_on_a_layer_of_two_weights():
    """f doubles both channels, g only the first; X = (1, 3), Y = (2, 5)."""

    def pruned(hidden_states):
        return hidden_states * torch.tensor([2.0, 0.0])

    dense_input, own_input = states(1, 3), states(2, 5)
    arriving = squared_difference(own_input, dense_input)
    norms = local_errors(pruned, dense_input, arriving, pruned(own_input), 2 * dense_input)
    parts = LocalErrors(1, *norms.tolist())
    # g(X) - f(X) = (0, -6); Y - X = (1, 2); g(Y) - g(X) = (2, 0); g(Y) - f(X) = (2, -6); f(X) = (2, 6)
    assert parts == LocalErrors(1, local=36, arriving=5, propagated=4, accumulated=40, energy=40)
    assert parts.factor == pytest.approx(0.8)


def test_without_an_arriving_error_the_factor_is_undefined():
    nothing = torch.zeros((), dtype=torch.float64)
    norms = local_errors(lambda x: 0 * x, states(1, 1), nothing, states(0, 0), states(1, 1))
    parts = LocalErrors(1, *norms.tolist())
    assert (parts.local, parts.accumulated, parts.factor) == (2, 2, None)


def test_differences_are_computed_in_float32():
    """In bfloat16 the square of 1/256 would vanish when added to 1."""
    one = torch.tensor([[[1.0, 2**-8]]], dtype=torch.bfloat16)
    assert squared_difference(one, torch.zeros_like(one)) == 1 + 2**-16
