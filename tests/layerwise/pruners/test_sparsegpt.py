"""SparseGPT compared with least squares and with its definition column by column, and exact counts."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from layerwise.pruners.sparsegpt import NotPositiveDefinite, SparseGPT

TOKENS = 200


def random_case(
    out_features: int, in_features: int, tokens: int = TOKENS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return a weight, and correlated inputs with one token per row."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) + torch.eye(in_features)
    inputs = torch.randn(tokens, in_features, generator=generator) @ mixing
    return torch.randn(out_features, in_features, generator=generator), inputs


def pruned(weight: Tensor, inputs: Tensor, count: int, group: int | None = None, **settings: float) -> Tensor:
    pruner = SparseGPT(**settings)  # type: ignore[arg-type]
    return pruner.prune(weight, pruner.prepare(inputs.T @ inputs, len(inputs)), count, group)


def output_error(weight: Tensor, other: Tensor, inputs: Tensor) -> float:
    return float((inputs.double() @ (weight - other).double().T).square().sum())


def damped_hessian(inputs: Tensor, damping: float) -> Tensor:
    gram = inputs.double().T @ inputs.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def one_column_at_a_time(
    weight: Tensor, inputs: Tensor, removed: Tensor | None, in_group: tuple[int, int] = (0, 1)
) -> Tensor:
    """Run optimal brain surgeon from left to right, without a factorization, blocks or delayed corrections.

    The columns after ``k`` are corrected with the inverse of the Hessian of the columns from ``k``. Without a mask, N
    of every M weights are removed (``in_group``), selected at the start of their group.
    """
    weight, hessian = weight.double().clone(), damped_hessian(inputs, 0.01)
    inverses = [torch.linalg.inv(hessian[column:, column:]) for column in range(len(hessian))]
    mask = torch.zeros_like(weight, dtype=torch.bool) if removed is None else removed
    few, group = in_group
    for column, inverse in enumerate(inverses):
        if removed is None and column % group == 0:
            costs = torch.tensor([float(inverses[column + each][0, 0]) for each in range(group)])
            scores = weight[:, column : column + group].square() / costs
            for row in range(len(weight)):
                mask[row, column + scores[row].argsort(stable=True)[:few]] = True
        step = torch.where(mask[:, column], weight[:, column], 0) / inverse[0, 0]
        weight[:, column:] -= step[:, None] * inverse[0]
        weight[mask[:, column], column] = 0
    return weight


def test_the_correction_of_a_removed_weight_by_hand():
    # The inputs are x and x + y: with w = (1, 3), the output is 4 x + 3 y. Without the first weight, v (x + y) comes
    # closest with v = 3.5, x and y being orthogonal and of one length.
    inputs = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert pruned(torch.tensor([[1.0, 3.0]]), inputs, 1, damping=1e-6).tolist() == [
        [0, pytest.approx(3.5, abs=1e-4)]
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("removed", [1, 2])
def test_the_columns_after_the_removed_ones_are_the_least_squares_optimum(seed, removed):
    """Corrections only affect columns to the right, so the optimum needs all columns to the left to be removed."""
    weight, inputs = random_case(1, 3, seed=seed)
    weight[0, :removed] *= 0.01
    result = pruned(weight, inputs, removed, damping=1e-7)
    assert (result == 0).tolist() == [[column < removed for column in range(3)]]
    target = inputs @ weight.T
    optimum = torch.linalg.lstsq(inputs[:, removed:].double(), target.double()).solution
    torch.testing.assert_close(result[:, removed:].double(), optimum.T, rtol=1e-4, atol=1e-5)
    nudges = torch.randn(100, 3, generator=torch.Generator().manual_seed(seed)) * 0.01
    nudges[:, :removed] = 0
    best = output_error(weight, result, inputs)
    assert all(output_error(weight, result + nudge, inputs) > best for nudge in nudges)


def test_columns_to_the_left_of_a_removed_one_do_not_change():
    weight, inputs = random_case(6, 5)
    weight[:, 3] *= 1e-4
    result = pruned(weight, inputs, 6)
    assert (result == 0).nonzero()[:, 1].tolist() == [3] * 6
    assert torch.equal(result[:, :3], weight[:, :3])
    assert not torch.equal(result[:, 4], weight[:, 4])


def test_weights_that_columns_to_the_right_can_replace_are_removed_first():
    # Both weights are 1. The first input, 3 x, can mostly be replaced by the second, 3 x + y: removing it costs .9
    # instead of the 9 that its size suggests. The last one has no column to its right: removing it costs 10.
    inputs = torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    assert pruned(torch.tensor([[1.0, 1.0]]), inputs, 1, damping=1e-6)[0, 0] == 0
    # 10 x .25 < 9 x .9: now the last weight is removed first.
    result = pruned(torch.tensor([[3.0, 0.5]]), inputs, 1, damping=1e-6)
    assert result.tolist() == [[3, 0]]


@pytest.mark.parametrize("count", [0, 1, 31, 46, 90, 91])
def test_within_one_block_the_lowest_scores_of_the_definition_are_removed(count):
    weight, inputs = random_case(7, 13)
    hessian = damped_hessian(inputs, 0.01)
    costs = [float(torch.linalg.inv(hessian[column:, column:])[0, 0]) for column in range(13)]
    scores = {
        (row, column): float(weight[row, column]) ** 2 / costs[column]
        for row in range(7)
        for column in range(13)
    }
    zeros = (pruned(weight, inputs, count) == 0).nonzero().tolist()
    assert sorted(map(tuple, zeros)) == sorted(sorted(scores, key=scores.__getitem__)[:count])


@pytest.mark.parametrize("block_size", [1, 2, 5, 13, 24, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_blocks_and_delayed_corrections_are_exact(block_size, sparsity):
    weight, inputs = random_case(10, 24)
    result = pruned(weight, inputs, round(240 * sparsity), block_size=block_size)
    expected = one_column_at_a_time(weight, inputs, removed=result == 0)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("few, group", [(2, 4), (1, 4), (4, 8), (1, 2), (3, 3), (0, 4), (5, 12)])
@pytest.mark.parametrize("block_size", [1, 5, 8, 24, 128])
def test_a_pattern_is_chosen_from_the_corrected_weights_for_all_block_sizes(few, group, block_size):
    weight, inputs = random_case(10, 24, seed=2)
    result = pruned(weight, inputs, 240 * few // group, group, block_size=block_size)
    assert ((result == 0).reshape(10, -1, group).sum(dim=2) == few).all()
    expected = one_column_at_a_time(weight, inputs, None, (few, group))
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 3, 4, 13, 128])
def test_counts_are_exact_and_distributed_evenly_to_the_blocks(block_size):
    weight, inputs = random_case(7, 13)
    pruner = SparseGPT(block_size=block_size)
    prepared = pruner.prepare(inputs.T @ inputs, TOKENS)
    for count in {*range(0, 92, 5), *range(88, 92), 1, 2}:
        zeros = pruner.prune(weight, prepared, count) == 0
        assert int(zeros.sum()) == count
        for stop in range(block_size, 13, block_size):
            assert abs(int(zeros[:, :stop].sum()) - Fraction(count * stop, 13)) <= Fraction(1, 2)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("group", [None, 10])
def test_correction_lowers_the_error_of_the_same_mask(sparsity, group):
    weight, inputs = random_case(48, 60)
    result = pruned(weight, inputs, round(48 * 60 * sparsity), group, block_size=16)
    masked = weight * (result != 0)
    assert output_error(weight, result, inputs) < 0.8 * output_error(weight, masked, inputs)


@pytest.mark.parametrize("group", [None, 4])
def test_removing_nothing_returns_the_weight(group):
    weight, inputs = random_case(5, 8)
    assert torch.equal(pruned(weight, inputs, 0, group), weight)


@pytest.mark.parametrize("group", [None, 4])
def test_removing_everything_leaves_nothing(group):
    weight, inputs = random_case(5, 8)
    assert not pruned(weight, inputs, 40, group).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_weight_and_is_rounded_once(dtype):
    weight, inputs = random_case(12, 16)
    low = weight.to(dtype)
    result = pruned(low, inputs, 77)
    assert result.dtype == dtype
    assert int((result == 0).sum()) == 77
    assert torch.equal(result, pruned(low.float(), inputs, 77).to(dtype))


def test_a_transposed_weight_is_pruned_like_a_copy_of_it_and_stays_transposed():
    weight, inputs = random_case(12, 16)
    stored = weight.T.contiguous()  # as GPT-2 does
    result, expected = pruned(stored.T, inputs, 77), pruned(weight, inputs, 77)
    assert torch.equal(result, expected)
    assert result.T.is_contiguous()
    assert expected.is_contiguous()


def test_of_equal_scores_those_of_the_first_columns_are_removed():
    result = pruned(torch.ones(2, 3), torch.eye(3), 3)
    assert result.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert pruned(torch.ones(2, 4), torch.eye(4), 4, group=2).tolist() == [[0, 1, 0, 1]] * 2


def test_weight_and_gram_are_left_unchanged():
    weight, inputs = random_case(4, 6)
    gram = inputs.T @ inputs
    before = weight.clone(), gram.clone()
    prepared = SparseGPT().prepare(gram, TOKENS)
    prepared_before = prepared.clone()
    SparseGPT().prune(weight, prepared, 12)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    assert torch.equal(prepared, prepared_before)


@pytest.mark.parametrize("double_inputs", [0, 16384])
@pytest.mark.parametrize("panel", [1, 3, 4, 256])
def test_the_factor_is_that_of_the_inverse_hessian(monkeypatch, double_inputs, panel):
    monkeypatch.setattr("layerwise.pruners.sparsegpt.DOUBLE_INPUTS", double_inputs)
    monkeypatch.setattr("layerwise.pruners.sparsegpt.PANEL", panel)
    _, inputs = random_case(1, 11)
    factor = SparseGPT().prepare(inputs.T @ inputs, TOKENS)
    inverse = torch.linalg.inv(damped_hessian(inputs, 0.01) / TOKENS)
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor, torch.linalg.cholesky(inverse, upper=True).float(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("double_inputs", [0, 16384])
@pytest.mark.parametrize("in_features, moved", [(10, 1), (11, 3), (11, 1000)])
def test_a_preparation_in_the_memory_of_the_gram_matrix_is_the_same(
    monkeypatch, double_inputs, in_features, moved
):
    monkeypatch.setattr("layerwise.pruners.sparsegpt.DOUBLE_INPUTS", double_inputs)
    _, inputs = random_case(1, in_features)
    inputs[:, 4] = 0
    gram = inputs.T @ inputs
    expected = SparseGPT().prepare(gram, TOKENS)
    monkeypatch.setattr("layerwise.pruners.sparsegpt.REVERSED_ENTRIES", moved)
    prepared = SparseGPT().prepare(gram, TOKENS, overwrite=True)
    assert torch.equal(prepared, expected)
    assert prepared.data_ptr() == gram.data_ptr()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_unit_of_the_inputs_does_not_matter(scale):
    weight, inputs = random_case(8, 10)
    inputs[:, 4] = 0
    torch.testing.assert_close(
        pruned(weight, inputs * scale, 40), pruned(weight, inputs, 40), rtol=1e-4, atol=1e-5
    )


def test_the_weights_of_a_zero_input_are_removed_first_and_cost_nothing():
    weight, inputs = random_case(4, 6)
    weight[:, 2] = 100
    inputs[:, 2] = 0
    result = pruned(weight, inputs, 4)
    assert (result == 0).nonzero()[:, 1].tolist() == [2] * 4
    assert output_error(weight, result, inputs) == 0


def test_the_remaining_weights_of_a_zero_input_keep_their_value():
    weight, inputs = random_case(4, 6)
    inputs[:, 2] = 0
    result = pruned(weight, inputs, 3)
    assert (result == 0).nonzero().tolist() == [[0, 2], [1, 2], [2, 2]]
    assert result[3, 2] == weight[3, 2]


def test_a_zero_input_does_not_affect_the_others():
    weight, inputs = random_case(4, 6)
    live = [0, 2, 3, 4, 5, 6]
    more_weight, more_inputs = torch.full((4, 7), 9.0), torch.zeros(TOKENS, 7)
    more_weight[:, live], more_inputs[:, live] = weight, inputs
    result = pruned(more_weight, more_inputs, 4 + 12)
    assert not result[:, 1].any()
    torch.testing.assert_close(result[:, live], pruned(weight, inputs, 12))


def test_inputs_that_are_all_zero_can_be_pruned_and_correct_nothing():
    weight = torch.ones(2, 3)
    assert pruned(weight, torch.zeros(5, 3), 3).tolist() == [[0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize("tokens", [1, 5, 15])
def test_fewer_tokens_than_inputs_suffice_with_damping(tokens):
    weight, inputs = random_case(8, 16, tokens)
    result = pruned(weight, inputs, 64)
    assert int((result == 0).sum()) == 64
    assert result.isfinite().all()
    assert output_error(weight, result, inputs) < output_error(weight, weight * (result != 0), inputs)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("tokens", [1, 5, 15])
def test_without_damping_a_singular_hessian_is_refused_even_if_rounding_hides_it(tokens, seed):
    _, inputs = random_case(1, 16, tokens, seed)
    with pytest.raises(
        NotPositiveDefinite, match=rf"16 inputs .* damping 0 after {tokens} .* e\.g\. to 0\.01"
    ):
        SparseGPT(damping=0).prepare(inputs.T @ inputs, tokens)


def test_two_equal_inputs_need_damping():
    weight, inputs = random_case(4, 6)
    inputs[:, 5] = inputs[:, 1]
    with pytest.raises(NotPositiveDefinite):
        pruned(weight, inputs, 12, damping=0)
    assert pruned(weight, inputs, 12).isfinite().all()


def test_a_matrix_that_is_not_a_gram_matrix_is_refused():
    with pytest.raises(NotPositiveDefinite, match=r"Raise the damping, e\.g\. to 0\.1, or calibrate on more"):
        SparseGPT().prepare(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 10)


def test_independent_inputs_need_no_damping():
    weight, inputs = random_case(4, 6)
    assert int((pruned(weight, inputs, 12, damping=0) == 0).sum()) == 12


def test_zero_tokens_and_infinite_inputs_are_refused():
    with pytest.raises(ValueError, match="come from 0 tokens .* Pass at least one window"):
        SparseGPT().prepare(torch.zeros(2, 2), 0)
    with pytest.raises(ValueError, match="1 of 2 inputs are not finite"):
        SparseGPT().prepare(torch.tensor([[math.inf, 0.0], [0.0, 1.0]]), 4)


@pytest.mark.parametrize(
    "count, group, words",
    [
        (-1, None, "cannot remove -1 of 24 weights"),
        (25, None, "cannot remove 25 of 24 weights"),
        (12, 4, "6 inputs cannot be split into groups of 4"),
        (12, 0, "groups of 0"),
        (13, 2, "1.08333 of every 2, which is not an integer. Remove a multiple of 12 weights"),
    ],
)
def test_counts_that_cannot_be_met_are_refused(count, group, words):
    weight, inputs = random_case(4, 6)
    with pytest.raises(ValueError, match=words):
        pruned(weight, inputs, count, group)


def test_the_factor_of_another_linear_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 6\) does not match second moments of 5 inputs"):
        SparseGPT().prune(torch.ones(4, 6), torch.eye(5), 12)


def test_a_weight_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        SparseGPT().prune(torch.tensor([[1.0, math.nan]]), torch.eye(2), 1)


@pytest.mark.parametrize("settings", [{"block_size": 0}, {"damping": -0.1}, {"damping": math.nan}])
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is"):
        SparseGPT(**settings)
