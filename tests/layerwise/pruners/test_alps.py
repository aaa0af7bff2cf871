"""ALPS, by hand, compared with all supports of tiny weights, and compared with least squares."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from layerwise.pruners.alps import ALPS, refit
from layerwise.pruners.masks import removal_levels
from layerwise.pruners.sparsegpt import SparseGPT

EXACT = ALPS(damping=0, refit_steps=32)


def correlated(tokens: int, in_features: int, seed: int = 0) -> Tensor:
    """Return strongly correlated inputs of very different size, shape ``(tokens, in_features)``."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, in_features, generator=generator) @ torch.randn(
        in_features, in_features, generator=generator
    )
    return mixed * torch.logspace(-1, 1, in_features)


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def pruned(
    weight: Tensor, inputs: Tensor, count: int, group: int | None = None, pruner: ALPS | SparseGPT = EXACT
) -> Tensor:
    return pruner.prune(weight, pruner.prepare(inputs.T @ inputs, len(inputs)), count, group)  # type: ignore[arg-type]


def error(weight: Tensor, sparse: Tensor, inputs: Tensor) -> float:
    """Return the squared change of the outputs, as a fraction of the squared outputs."""
    outputs, change = inputs.double() @ weight.double().T, inputs.double() @ (weight - sparse).double().T
    return float(change.square().sum() / outputs.square().sum())


def least_squares(weight: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """Return the best weight with zeros outside ``kept``, row by row."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept_in_row, dense in zip(best, kept, weight.double(), strict=True):
        row[kept_in_row] = torch.linalg.lstsq(
            inputs[:, kept_in_row].double(), inputs.double() @ dense, driver="gelsd"
        ).solution
    return best


def wanda(weight: Tensor, inputs: Tensor, count: int, by_row: bool) -> Tensor:
    """Return the mask of the entries with the smallest ``|w|`` times input norm."""
    return removal_levels(weight, lambda rows: rows.abs() * inputs.norm(dim=0), [count], by_row=by_row) == 0


def test_the_weight_of_an_equal_input_replaces_a_removed_weight():
    # Both inputs are the same: w' = (0, 2) would be exact. Damping 1 / 100 stops the second one at 1 + 1 / 1.01.
    inputs = torch.tensor([[3.0, 3.0], [4.0, 4.0]])
    assert pruned(torch.tensor([[1.0, 1.0]]), inputs, 1).tolist() == [[0, pytest.approx(2)]]
    damped = pruned(torch.tensor([[1.0, 1.0]]), inputs, 1, pruner=ALPS())
    assert damped.tolist() == [[0, pytest.approx(1 + 1 / 1.01)]]


def test_removal_costs_nothing_if_the_other_weights_can_replace_it():
    # The third input is the sum of the first two, which are uncorrelated: 3 x3 = 3 x1 + 3 x2.
    inputs = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]] * 2)
    sparse = pruned(torch.tensor([[1.0, 2.0, 3.0]]), inputs, 1)
    assert error(torch.tensor([[1.0, 2.0, 3.0]]), sparse, inputs) < 1e-10


@pytest.mark.parametrize("count", [0, 1, 7, 16, 31, 32])
def test_with_uncorrelated_inputs_the_smallest_contributions_are_removed_and_the_others_do_not_change(count):
    weight = random_weight(4, 8)
    norms = torch.arange(1, 9).float()
    sparse = ALPS().prune(weight, ALPS().prepare(norms.square().diag(), tokens=5), count)
    smallest = (weight.abs() * norms).flatten().argsort()[:count]
    expected = weight.flatten().clone()
    expected[smallest] = 0
    assert torch.equal(sparse, expected.reshape(4, 8))


def test_rows_that_matter_less_lose_more():
    sparse = ALPS().prune(
        torch.tensor([[10.0, 20.0], [1.0, 2.0]]), ALPS().prepare(torch.eye(2), tokens=1), count=2
    )
    assert sparse.tolist() == [[10, 20], [0, 0]]


def test_of_equal_weights_the_first_are_removed():
    prepared = ALPS().prepare(torch.eye(4), tokens=1)
    assert ALPS().prune(torch.ones(2, 4), prepared, 5).tolist() == [[0] * 4, [0, 1, 1, 1]]
    assert ALPS().prune(torch.ones(2, 4), prepared, 4, group=2).tolist() == [[0, 1, 0, 1]] * 2


@pytest.mark.parametrize("rows, count", [(1, 1), (1, 2), (1, 3), (2, 3), (2, 4), (2, 5)])
def test_on_tiny_weights_the_error_is_close_to_that_of_the_best_support(rows, count):
    ratios = []
    for seed in range(10):
        weight, inputs = random_weight(rows, 4, seed), correlated(30, 4, seed)
        supports = []
        for removed in combinations(range(rows * 4), count):
            kept = torch.ones(rows * 4, dtype=torch.bool)
            kept[list(removed)] = False
            supports.append(error(weight, least_squares(weight, inputs, kept.reshape(rows, 4)), inputs))
        ratios.append(error(weight, pruned(weight, inputs, count), inputs) / min(supports))
    # In eight of ten cases the support is the best one.
    assert sorted(ratios)[7] == pytest.approx(1, abs=1e-3)
    assert max(ratios) < 3


def test_the_remaining_weights_solve_the_least_squares_problem():
    weight, inputs = random_weight(1, 12), correlated(100, 12)
    sparse = pruned(weight, inputs, 7)
    assert torch.allclose(sparse.double(), least_squares(weight, inputs, sparse != 0), rtol=1e-3, atol=1e-4)


def test_no_step_of_the_fit_raises_the_error_and_only_kept_weights_change():
    change, inputs = random_weight(6, 12), correlated(100, 12)
    before, gram, removed = change.clone(), inputs.T @ inputs, random_weight(6, 12, seed=1) < 0
    gram = gram / gram.diagonal().sqrt() / gram.diagonal().sqrt()[:, None]
    fitted = [refit(change.clone(), gram, removed, steps) for steps in range(8)]
    forms = torch.stack([(one @ gram * one).sum(dim=1) for one in fitted])
    assert (forms[1:] <= forms[:-1] * (1 + 1e-5)).all()
    assert forms[-1].sum() < 0.5 * forms[0].sum()
    assert all(torch.equal(one[removed], before[removed]) for one in fitted)
    assert torch.equal(fitted[0], before)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_the_error_is_clearly_lower_than_that_of_wanda_and_of_sparsegpt(sparsity):
    weight, inputs = random_weight(48, 64), correlated(1000, 64)
    count = round(sparsity * weight.numel())
    found = error(weight, pruned(weight, inputs, count, pruner=ALPS()), inputs)
    assert found < 0.5 * error(
        weight, weight.masked_fill(wanda(weight, inputs, count, by_row=True), 0), inputs
    )
    assert found < 0.8 * error(weight, pruned(weight, inputs, count, pruner=SparseGPT()), inputs)


@pytest.mark.parametrize("count", [1, 150, 301, 450, 590])
@pytest.mark.parametrize("kind", ["unrelated", "correlated", "few tokens", "common mean"])
def test_the_error_never_exceeds_that_of_wandas_mask_with_the_others_fitted(kind, count):
    noise = torch.randn(400, 30, generator=torch.Generator().manual_seed(2))
    inputs = {
        "unrelated": noise,
        "correlated": correlated(400, 30),
        "few tokens": noise[:20],
        "common mean": noise + 5,
    }[kind]
    weight = random_weight(20, 30)
    kept = ~wanda(weight, inputs, count, by_row=False)
    bound = error(weight, least_squares(weight, inputs, kept), inputs)
    assert error(weight, pruned(weight, inputs, count), inputs) <= bound * 1.001 + 1e-9


@pytest.mark.parametrize("count", [0, 1, 2, 17, 100, 101, 159, 160])
def test_exactly_the_requested_number_of_weights_is_removed(count):
    sparse = pruned(random_weight(10, 16), correlated(50, 16), count)
    assert int((sparse == 0).sum()) == count


@pytest.mark.parametrize("group, each", [(4, 0), (4, 1), (4, 2), (4, 3), (4, 4), (8, 5), (16, 7), (2, 1)])
def test_with_a_pattern_every_group_of_every_row_loses_the_same_number(group, each):
    weight, inputs = random_weight(10, 16), correlated(50, 16)
    sparse = pruned(weight, inputs, 160 // group * each, group)
    assert ((sparse == 0).reshape(-1, group).sum(dim=1) == each).all()


def test_with_a_pattern_the_error_is_lower_than_that_of_sparsegpt():
    weight, inputs = random_weight(48, 64), correlated(1000, 64)
    sparse, rival = (pruned(weight, inputs, 48 * 32, 4, pruner) for pruner in (ALPS(), SparseGPT()))
    assert error(weight, sparse, inputs) < 0.8 * error(weight, rival, inputs)


def test_nothing_is_changed_if_nothing_is_removed():
    weight = random_weight(10, 16)
    assert torch.equal(pruned(weight, correlated(50, 16), 0, pruner=ALPS()), weight)


@pytest.mark.parametrize("scale", [2.0**-20, 3.0, 1e6])
def test_the_scale_of_the_inputs_does_not_matter(scale):
    weight, inputs = random_weight(10, 16), correlated(50, 16)
    gram = inputs.T @ inputs
    sparse, other = (
        ALPS().prune(weight, ALPS().prepare(gram * square, tokens), 80)
        for square, tokens in ((1, 50), (scale, 7))
    )
    assert torch.equal(sparse == 0, other == 0)
    assert torch.allclose(sparse, other, rtol=1e-3, atol=1e-4)


def test_the_weights_of_a_zero_input_are_removed_first_and_do_not_affect_the_others():
    weight, inputs = random_weight(5, 9), correlated(50, 9)
    inputs[:, 3] = 0
    others = [index for index in range(9) if index != 3]
    sparse = pruned(weight, inputs, 5 + 12)
    assert sparse[:, 3].tolist() == [0] * 5
    alone = pruned(weight[:, others], inputs[:, others], 12)
    assert torch.equal(sparse[:, others] == 0, alone == 0)
    assert torch.allclose(sparse[:, others], alone, rtol=1e-3, atol=1e-4)


def test_the_remaining_weights_of_a_zero_input_do_not_change():
    weight, inputs = random_weight(5, 9), correlated(50, 9)
    inputs[:, 3] = 0
    expected = weight.clone()
    expected[:2, 3] = 0
    assert torch.equal(pruned(weight, inputs, 2), expected)
    assert pruned(weight[:1], torch.zeros(4, 9), 7).tolist() == [[0.0] * 7 + weight[0, 7:].tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_of_low_precision_is_rounded_once_at_the_end(dtype):
    weight, inputs = random_weight(10, 16).to(dtype), correlated(50, 16)
    sparse = pruned(weight, inputs, 81)
    assert sparse.dtype == dtype
    assert torch.equal(sparse, pruned(weight.float(), inputs, 81).to(dtype))


def test_the_inverses_of_all_levels_are_computed_once_for_all_weights_and_sparsities(monkeypatch):
    calls = []
    invert = torch.cholesky_inverse
    monkeypatch.setattr(
        torch, "cholesky_inverse", lambda *args, **kwargs: calls.append(1) or invert(*args, **kwargs)
    )
    inputs = correlated(50, 16)
    prepared = ALPS(levels=3).prepare(inputs.T @ inputs, 50)
    for seed in (0, 1):
        for count in (40, 80, 120):
            ALPS(levels=3).prune(random_weight(10, 16, seed), prepared, count)
    assert len(calls) == 3


@pytest.mark.parametrize("panel", [1, 3, 5, 16, 100])
def test_the_size_of_the_panels_that_inverses_are_kept_in_does_not_matter(monkeypatch, panel):
    weight, inputs = random_weight(10, 16), correlated(50, 16)
    expected = pruned(weight, inputs, 80)
    monkeypatch.setattr("layerwise.calibration.upper_triangle.PANEL", panel)
    assert torch.equal(pruned(weight, inputs, 80), expected)


def test_a_preparation_in_the_memory_of_the_gram_matrix_gives_the_same_weights():
    weight, inputs = random_weight(10, 16), correlated(50, 16)
    gram = inputs.T @ inputs
    prepared = EXACT.prepare(gram.clone(), 50, overwrite=True)
    assert torch.equal(EXACT.prune(weight, prepared, 80), pruned(weight, inputs, 80))
    prepared = EXACT.prepare(gram, 50, overwrite=True)
    assert prepared.hessian.data_ptr() == gram.data_ptr()


def test_one_preparation_serves_all_sparsities_and_inputs_are_left_unchanged():
    weight, inputs = random_weight(10, 16), correlated(50, 16)
    gram = inputs.T @ inputs
    before = weight.clone(), gram.clone()
    prepared = EXACT.prepare(gram, 50)
    sparse = {count: EXACT.prune(weight, prepared, count) for count in (120, 40, 81)}
    for count, one in sparse.items():
        assert torch.equal(one, pruned(weight, inputs, count))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"damping": -0.1}, "damping is -0.1; it must be 0 or more"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"rho": 0.0}, "rho is 0; it must be positive"),
        ({"rho": float("inf")}, "rho is inf"),
        ({"levels": 0}, "levels is 0; it must be from 1"),
        ({"iterations": 0}, "iterations is 0; it must be from 1"),
        ({"refit_steps": -1}, "refit_steps is -1; it must be from 0"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ALPS(**settings)


def test_invalid_second_moments_are_refused():
    with pytest.raises(ValueError, match="from 0 tokens and 0 of 2 inputs are not finite. Pass at least one"):
        ALPS().prepare(torch.zeros(2, 2), tokens=0)
    with pytest.raises(ValueError, match="1 of 2 inputs are not finite.*compute in bfloat16"):
        ALPS().prepare(torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]), tokens=3)


def test_a_matrix_that_is_not_a_sum_of_squares_is_refused():
    impossible = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="2 inputs is not positive definite with damping 0.01 and rho 0.1"):
        ALPS().prepare(impossible, tokens=3)


@pytest.mark.parametrize(
    "shape, count, group, message",
    [
        ((2, 3), 1, None, r"shape \(2, 3\) does not match second moments of 4 inputs"),
        ((2, 4), -1, None, "cannot remove -1 of 8 weights"),
        ((2, 4), 9, None, "cannot remove 9 of 8 weights"),
        ((2, 4), 3, 3, "4 inputs cannot be split into groups of 3"),
        ((2, 4), 3, 4, "removes 1.5 of every 4"),
    ],
)
def test_weights_and_counts_that_do_not_match_are_refused(shape, count, group, message):
    with pytest.raises(ValueError, match=message):
        ALPS().prune(torch.ones(shape), ALPS().prepare(torch.eye(4), tokens=1), count, group)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        ALPS().prune(torch.tensor([[1.0, float("nan")]]), ALPS().prepare(torch.eye(2), tokens=1), 1)
