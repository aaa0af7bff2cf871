"""LSA: the greedy choice step by step, and its error compared with the outputs."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.lsa import LSA, half_removed_error, lsa


def random_layer(out_features: int, in_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return weights and correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(40, in_features, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(out_features, in_features, generator=generator, dtype=torch.float64), inputs


def output_error(row: Tensor, inputs: Tensor, removed: list[int]) -> float:
    """Return the change of the outputs when the weights of these inputs are removed."""
    kept = row.clone()
    kept[removed] = 0
    return (inputs @ row - inputs @ kept).square().sum().item()


def greedily_removed(row: Tensor, inputs: Tensor, group_size: int) -> list[int]:
    """Remove, one by one, the weight of the current group whose removal gives the lowest error."""
    removed: list[int] = []
    for first in range(0, len(row), group_size):
        group = list(range(first, min(first + group_size, len(row))))
        for _ in range(len(group) // 2):
            left = [column for column in group if column not in removed]
            removed.append(min(left, key=lambda column: output_error(row, inputs, [*removed, column])))
    return removed


def test_the_error_of_a_row_equals_that_of_removing_weights_one_by_one():
    for seed in range(20):
        weight, inputs = random_layer(1, 6, seed)
        expected = output_error(weight[0], inputs, greedily_removed(weight[0], inputs, 6))
        assert half_removed_error(weight, inputs.T @ inputs) == pytest.approx(expected)


@pytest.mark.parametrize("in_features, group_size", [(12, 4), (13, 4), (11, 3), (10, 128), (5, 1)])
def test_groups_account_for_earlier_groups_and_rows_are_independent(monkeypatch, in_features, group_size):
    monkeypatch.setattr("layerwise.allocators.lsa.GROUP_SIZE", group_size)
    weight, inputs = random_layer(5, in_features, in_features)
    expected = sum(output_error(row, inputs, greedily_removed(row, inputs, group_size)) for row in weight)
    assert half_removed_error(weight, inputs.T @ inputs) == pytest.approx(expected)


def test_the_greedy_choice_is_close_to_the_best_choice():
    for seed in range(20):
        weight, inputs = random_layer(1, 6, seed)
        halves = itertools.combinations(range(6), 3)
        best = min(output_error(weight[0], inputs, list(half)) for half in halves)
        assert best * (1 - 1e-9) <= half_removed_error(weight, inputs.T @ inputs)


def test_weights_that_cancel_each_other_are_removed_together():
    # Their inputs are the same: removing 2 costs 4, removing -2 then gives it back.
    weight = torch.tensor([[2.0, -2.0, 1.0, 3.0]])
    gram = torch.tensor(
        [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    )
    assert half_removed_error(weight, gram) == 0


def test_with_uncorrelated_inputs_the_smallest_products_are_removed():
    # Squares times input energies: 1 x 4, 9 x 1, 4 x 1, 25 x 0: the two smallest are 0 and 4.
    weight = torch.tensor([[1.0, 3.0, -2.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    gram = torch.tensor([4.0, 1.0, 1.0, 0.0]).diag()
    # The second row has the products 4, 1, 1, 0; those of 0 and 1 are removed.
    assert half_removed_error(weight, gram) == 4 + 1


def test_scaling_the_gram_matrix_scales_the_error():
    weight, inputs = random_layer(3, 8, 0)
    gram = inputs.T @ inputs
    assert half_removed_error(weight, gram / 64) == pytest.approx(half_removed_error(weight, gram) / 64)


def test_float32_and_narrow_weights_give_the_error_of_float64():
    weight, inputs = random_layer(16, 300, 1)
    weight = weight.to(torch.bfloat16)
    gram = (inputs.T @ inputs).float()
    exact = half_removed_error(weight.double(), gram.double())
    assert half_removed_error(weight, gram) == pytest.approx(exact, rel=1e-3)
    assert half_removed_error(weight.float(), gram) == half_removed_error(weight, gram)


def test_weights_and_gram_matrix_are_left_unchanged():
    weight, gram = torch.ones(2, 4), torch.eye(4)
    half_removed_error(weight, gram)
    assert torch.equal(weight, torch.ones(2, 4))
    assert torch.equal(gram, torch.eye(4))


def test_a_single_column_loses_nothing():
    assert half_removed_error(torch.ones(3, 1), torch.eye(1)) == 0


@pytest.mark.parametrize("weight, size", [((2, 4), 3), ((4,), 4)])
def test_shapes_that_do_not_match_are_refused(weight, size):
    with pytest.raises(ValueError, match="does not match a Gram matrix of shape"):
        half_removed_error(torch.ones(weight), torch.eye(size))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match=r"the error of a weight of shape \(1, 2\) is"):
        half_removed_error(torch.tensor([[bad, bad]]), torch.eye(2))


def test_sparsities_are_those_of_the_published_formula():
    errors, target, beta = [3.0, 1.0, 8.0, 2.0], 0.6, 0.1
    importances = [1 - error / sum(errors) for error in errors]
    scaled = [(i - min(importances)) / (max(importances) - min(importances)) for i in importances]
    deviations = [2 * beta * value for value in scaled]
    expected = [target + sum(deviations) / 4 - deviation for deviation in deviations]
    assert lsa(errors, [8] * 4, target, beta) == pytest.approx(expected)


def test_a_larger_error_gives_a_higher_sparsity():
    layers = LSA().allocate([1.0, 4.0, 2.0], [1, 1, 1], 0.7)
    assert layers[0] < layers[2] < layers[1]
    assert layers[1] - layers[0] == pytest.approx(0.3)


def test_linears_of_unequal_size_keep_the_weighted_mean():
    sizes = [4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096, 14336 * 4096, 14336 * 4096, 14336 * 4096]
    linears = LSA(beta=0.4).allocate([5.0, 1.0, 0.0, 9.0, 30.0, 2.0, 20.0], sizes, 0.7)
    assert weighted_mean(linears, sizes) == pytest.approx(0.7, abs=1e-12)
    assert 0 <= min(linears) <= max(linears) <= 1


@pytest.mark.parametrize("beta", [-0.01, 1.01, math.nan])
def test_a_beta_outside_0_and_1_is_refused(beta):
    with pytest.raises(ValueError, match="beta of LSA"):
        LSA(beta=beta)
