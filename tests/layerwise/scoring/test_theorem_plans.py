"""Plans for the theorems: uniform plans, and orders of the same sparsities."""

from itertools import pairwise

import pytest

from layerwise.allocators.budget import weighted_mean
from layerwise.scoring.theorem_plans import theory_plans

EQUAL = [1000] * 8


def by_order(plans, target=0.6):
    return {each.order: each.plan.layers for each in plans if each.target == target}


def test_the_uniform_plans_rise_in_tenths_and_include_the_target():
    uniform = [each for each in theory_plans(0.55, None, EQUAL) if each.order == "uniform"]
    assert [each.target for each in uniform] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9]
    assert all(set(each.plan.layers) == {each.target} for each in uniform)


def test_a_target_among_the_tenths_is_tried_once():
    assert sum(each.order == "uniform" for each in theory_plans(0.6, None, EQUAL)) == 9


def test_all_orders_have_the_same_sparsities_and_the_first_one_ascends():
    orders = by_order(theory_plans(0.6, 0.05, EQUAL))
    del orders["uniform"]
    assert [*orders] == ["ascending", "descending", "shuffled 0", "shuffled 1", "shuffled 2", "shuffled 3"]
    ascending = orders["ascending"]
    assert [after - before for before, after in pairwise(ascending)] == pytest.approx([0.05] * 7)
    assert orders["descending"] == ascending[::-1]
    assert all(sorted(layers) == pytest.approx(ascending, abs=1e-12) for layers in orders.values())
    assert len(set(orders.values())) == 6


def test_the_default_beta_is_a_sixth_of_the_largest_legal_one():
    """The last of 8 layers may not rise above 1: beta <= (1 - .6) / 3.5."""
    ascending = next(each for each in theory_plans(0.6, None, EQUAL) if each.order == "ascending")
    assert ascending.plan.beta == pytest.approx(0.4 / 3.5 / 6)
    assert ascending.plan.layers[-1] == pytest.approx(0.6 + 0.2 / 3)


def test_with_layers_of_different_sizes_all_orders_have_the_same_overall_sparsity():
    sizes = [100, 900, 500, 3000]
    for layers in by_order(theory_plans(0.6, None, sizes)).values():
        assert weighted_mean(layers, sizes) == pytest.approx(0.6, abs=1e-12)


def test_two_layers_have_two_orders():
    assert [*by_order(theory_plans(0.6, None, [10, 10]))] == ["uniform", "ascending", "descending"]


def test_the_same_arguments_give_the_same_plans():
    assert theory_plans(0.6, None, EQUAL) == theory_plans(0.6, None, EQUAL)


@pytest.mark.parametrize(
    "beta, sizes, problem",
    [
        (None, [10], "1 decoder layer"),
        (0.0, EQUAL, "needs a positive beta"),
        (-0.01, EQUAL, "needs a positive beta"),
        (0.2, EQUAL, "outside the legal range"),
    ],
)
def test_models_and_betas_without_orders_are_refused(beta, sizes, problem):
    with pytest.raises(ValueError, match=problem):
        theory_plans(0.6, beta, sizes)
