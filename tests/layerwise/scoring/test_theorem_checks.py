"""Checks of the theorems on errors that can be verified by hand."""

import itertools
import math

import pytest

from layerwise.scoring.local_errors import LocalErrors
from layerwise.scoring.theorem_checks import Orders, outcome_of, propagation_of, rise_of


def test_the_theorem_holds_if_errors_rise_with_every_step():
    rise = rise_of([[1.0, 5.0], [2.0, 6.0], [3.0, 9.0]])
    assert (rise.holds, rise.layers, rise.steps, rise.falls, rise.largest_fall) == (True, 2, 4, (), 0.0)


def test_a_fall_is_reported_by_layer_and_step_and_relative_to_the_error_before():
    rise = rise_of([[1.0, 8.0], [2.0, 6.0], [1.9, 9.0]])
    assert not rise.holds
    assert rise.falls == ((0, 1), (1, 0))  # 2 to 1.9, and 8 to 6
    assert rise.largest_fall == pytest.approx(0.25)


def test_a_constant_error_does_not_rise():
    rise = rise_of([[0.0, 1.0], [0.0, 1.0]])
    assert (rise.falls, rise.largest_fall) == (((0, 0), (1, 0)), 0.0)


def parts(local, arriving, propagated, accumulated, energy):
    return LocalErrors(1, local, arriving, propagated, accumulated, energy)


def test_the_factors_of_a_layer_are_ratios_of_errors_absolute_and_relative_to_the_signal():
    """The error doubles while the energy grows tenfold; local and propagated error are orthogonal."""
    propagation = propagation_of([parts(4, 0, 0, 4, 100), parts(2, 4, 8, 10, 1000)])
    (layer,) = propagation.layers
    assert (layer.layer, layer.factor, layer.relative_factor) == (1, 2.0, pytest.approx(0.2))
    assert layer.cross == pytest.approx(0)
    assert (layer.exceeds, layer.grows) == (True, True)
    assert (propagation.shrinking, propagation.relatively_shrinking) == ((), (1,))
    assert propagation.holds


def test_errors_that_cancel_violate_the_step_of_the_proof():
    """Local error 3 plus propagated error 8 minus 6 that cancel is 5, less than 8."""
    propagation = propagation_of([parts(4, 0, 0, 4, 100), parts(3, 16, 8, 5, 100)])
    (layer,) = propagation.layers
    assert layer.cross == pytest.approx(-6 / 5)
    assert (layer.exceeds, layer.grows, layer.factor) == (False, False, 0.5)
    assert (propagation.exceeding, propagation.growing, propagation.shrinking) == (0, 0, (1,))
    assert not propagation.holds


def test_layers_without_an_arriving_error_have_no_factor():
    layers = [parts(0, 0, 0, 0, 9), parts(1, 0, 0, 1, 9), parts(1, 1, 1, 2, 9)]
    assert [each.layer for each in propagation_of(layers).layers] == [2]


def test_medians_are_over_the_layers():
    layers = [parts(1, 0, 0, 1, 1), parts(1, 1, 1, 2, 1), parts(1, 2, 4, 5, 1), parts(1, 5, 50, 51, 1)]
    assert propagation_of(layers).median("factor") == 2.0


def recursive(order, sparsities, growth):
    """Return errors by the recursion that theorem 3.5 assumes: E_{i+1} = c E_i + f(s), here with f = s squared."""
    errors, error = [], 0.0
    for sparsity in sparsities:
        error = growth * error + sparsity**2
        errors.append(error)
    return outcome_of(order, errors, [1.0] * len(errors), [error])


@pytest.mark.parametrize("growth", [0.5, 1.0, 1.5])
def test_under_the_papers_recursion_the_ascending_order_is_the_best(growth):
    """This holds for any c above 0; the paper proves it for c above 1."""
    ascending, *others = itertools.permutations((0.2, 0.4, 0.6, 0.8))
    outcomes = [recursive("ascending", ascending, growth)]
    outcomes += [recursive(f"order {number}", order, growth) for number, order in enumerate(others)]
    orders = Orders(tuple(outcomes))
    assert orders.holds
    assert orders.below("total") == len(others) == 23


def test_totals_are_sums_over_the_layers_absolute_and_relative_to_their_energy():
    outcome = outcome_of("ascending", [1.0, 6.0], [10.0, 20.0], [1.0, 3.0])
    assert (outcome.total, outcome.last) == (7.0, 6.0)
    assert outcome.relative_total == pytest.approx(0.1 + 0.3)
    assert outcome.perplexity == pytest.approx(math.exp(2))


def test_each_measure_is_compared_separately_and_the_runner_up_is_the_best_other_order():
    ascending = outcome_of("ascending", [1.0, 6.0], [1, 1], [2.0, 3.0])
    shuffled = outcome_of("shuffled 0", [3.0, 5.0], [1, 1], [2.2, 3.1])
    descending = outcome_of("descending", [3.0, 3.0], [1, 1], [3.0, 4.0])
    orders = Orders((ascending, descending, shuffled))
    assert not orders.holds  # 7 is more than descending's 6
    assert (orders.below("total"), orders.below("last"), orders.below("perplexity")) == (1, 0, 2)
    assert orders.runner_up.order == "shuffled 0"
    assert orders.gain.mean == pytest.approx(-0.15)


def test_a_single_order_is_refused():
    with pytest.raises(ValueError, match="number of orders is 1"):
        Orders((outcome_of("ascending", [1.0], [1.0], [1.0]),))
