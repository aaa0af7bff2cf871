"""Wanda's masks improved by swaps: lower errors, the same counts, unchanged remaining weights."""

from itertools import product

import pytest
import torch
from torch import Tensor

from layerwise.calibration.statistics import InputStatistics
from layerwise.pruners.masks import removal_levels
from layerwise.pruners.wanda import Wanda
from layerwise.pruners.wanda_swaps import WandaSwaps, refine


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator)
    inputs = torch.randn(400, 32, generator=generator) @ mixing
    return torch.randn(24, 32, generator=generator), inputs


def error(weight, pruned, inputs):
    return float((inputs @ (weight - pruned).T).square().sum())


def pruned_by_wanda(weight, inputs, count, group=None):
    seen = InputStatistics.empty(32)
    seen.add(inputs.square().sum(dim=0), tokens=len(inputs))
    return weight.masked_fill(Wanda().removal_levels(weight, seen, [count], group) == 0, 0)


@pytest.mark.parametrize(("count", "group"), [(384, None), (400, None), (537, None), (384, 4), (384, 8)])
def test_swaps_lower_the_error_of_wandas_mask_and_change_neither_counts_nor_survivors(layer, count, group):
    weight, inputs = layer
    plain = pruned_by_wanda(weight, inputs, count, group)
    swapped = WandaSwaps().prune(weight, inputs.T @ inputs, count, group)
    assert error(weight, swapped, inputs) < 0.9 * error(weight, plain, inputs)
    kept = swapped != 0
    assert torch.equal(swapped[kept], weight[kept])
    assert torch.equal(kept.sum(dim=1), (plain != 0).sum(dim=1))
    if group:
        assert set(kept.reshape(-1, group).sum(dim=1).tolist()) == {group // 2}


def test_zero_rounds_give_wandas_mask(layer):
    weight, inputs = layer
    assert torch.equal(
        WandaSwaps(rounds=0).prune(weight, inputs.T @ inputs, 300), pruned_by_wanda(weight, inputs, 300)
    )


def test_uncorrelated_inputs_leave_nothing_to_swap():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    assert WandaSwaps().prune(weight, torch.eye(4), 2).tolist() == [[3.0, 0.0, 2.0, 0.0]]


def test_two_inputs_that_always_cancel_lose_both_their_weights():
    # x1 = -x2: removing both weights of 1 changes nothing, although each alone matters more than the others.
    gram = torch.tensor([[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    gram += torch.diag(torch.tensor([0.0, 0.0, 8.0]))
    pruned = WandaSwaps().prune(torch.tensor([[1.0, 1.0, 0.5]]), gram, 2)
    assert pruned.tolist() == [[0.0, 0.0, 0.5]]


def correlated_gram(in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(200, in_features, generator=generator) @ torch.randn(
        in_features, in_features, generator=generator
    )
    return mixed.T @ mixed


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def wanda(weight: Tensor, gram: Tensor, count: int, group: int | None = None) -> Tensor:
    """Return the mask of the entries with the smallest ``|w|`` times input norm in each row."""
    norms = gram.diagonal().sqrt()
    return removal_levels(weight, lambda rows: rows.abs() * norms, [count], by_row=True, group=group) == 0


def errors(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """Return the error of each row when the marked weights are removed; shape ``(out_features,)``."""
    removed = (weight * mask).double()
    return torch.einsum("ri,ij,rj->r", removed, gram.double(), removed)


def best_of_all_swaps(weight: Tensor, mask: Tensor, gram: Tensor, group: int) -> float:
    """Return the error of one row after the best swap."""
    (removed,), (kept,) = mask.nonzero(as_tuple=True), (~mask).nonzero(as_tuple=True)
    found = []
    for returning, leaving in product(removed.tolist(), kept.tolist()):
        if returning // group == leaving // group:
            swapped = mask.clone()
            swapped[returning], swapped[leaving] = False, True
            found.append(float(errors(weight[None], swapped[None], gram)))
    return min(found)


def test_two_weights_that_cancel_out_are_removed_together():
    # The first two inputs are equal and their weights opposite, so together they have no effect.
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mask = torch.tensor([[True, False, True]])
    assert refine(torch.tensor([[2.0, -2.0, 1.0]]), mask, gram, rounds=9).tolist() == [[True, True, False]]


def test_two_weights_that_add_up_are_not_removed_together():
    # Removing 2 and 2 costs (2 + 2)^2 = 16, removing 2 and 3 costs 4 + 9.
    gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    mask = torch.tensor([[True, True, False]])
    assert refine(torch.tensor([[2.0, 2.0, 3.0]]), mask, gram, rounds=9).tolist() == [[False, True, True]]


def test_with_uncorrelated_inputs_the_smallest_contributions_of_each_row_are_finally_removed():
    weight, gram = random_weight(6, 10), torch.arange(1.0, 11).diag()
    largest = wanda(1 / weight, gram.inverse(), 24)
    assert torch.equal(refine(weight, largest, gram, rounds=20), wanda(weight, gram, 24))


@pytest.mark.parametrize("rows, in_features, count", [(8, 4, 8), (8, 4, 16), (5, 12, 30), (5, 12, 41)])
@pytest.mark.parametrize("seed", range(3))
def test_finally_no_swap_lowers_the_error_of_any_row(rows, in_features, count, seed):
    weight, gram = random_weight(rows, in_features, seed), correlated_gram(in_features, seed)
    mask = refine(weight, wanda(weight, gram, count), gram, rounds=50)
    for row, marks in zip(weight, mask, strict=True):
        error = float(errors(row[None], marks[None], gram))
        assert best_of_all_swaps(row, marks, gram, in_features) >= error * (1 - 1e-5)


@pytest.mark.parametrize("group, each", [(2, 1), (4, 1), (4, 2), (6, 4)])
def test_with_a_pattern_finally_no_swap_within_a_group_lowers_the_error(group, each):
    weight, gram = random_weight(5, 12), correlated_gram(12)
    before = wanda(weight, gram, 60 // group * each, group)
    mask = refine(weight, before, gram, 50, group)
    assert not torch.equal(mask, before)
    assert (mask.reshape(-1, group).sum(dim=1) == each).all()
    for row, marks in zip(weight, mask, strict=True):
        error = float(errors(row[None], marks[None], gram))
        assert best_of_all_swaps(row, marks, gram, group) >= error * (1 - 1e-5)


@pytest.mark.parametrize("count", [0, 1, 7, 100, 301, 399, 400])
@pytest.mark.parametrize("seed", range(3))
def test_no_round_raises_the_error_and_every_row_keeps_its_number(count, seed):
    weight, gram = random_weight(20, 20, seed), correlated_gram(20, seed)
    mask = wanda(weight, gram, count)
    before, in_rows = errors(weight, mask, gram), mask.sum(dim=1)
    for rounds in range(1, 5):
        refined = refine(weight, mask, gram, rounds)
        after = errors(weight, refined, gram)
        assert (after <= before * (1 + 1e-6)).all()
        assert torch.equal(refined.sum(dim=1), in_rows)
        before = after


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_the_error_of_wandas_mask_falls_by_at_least_a_fifth(sparsity, group):
    weight, gram = random_weight(32, 64), correlated_gram(64)
    mask = wanda(weight, gram, round(sparsity * weight.numel()), group)
    refined = refine(weight, mask, gram, 3, group)
    assert errors(weight, refined, gram).sum() < 0.8 * errors(weight, mask, gram).sum()


def test_rounds_can_be_split_between_two_calls():
    weight, gram = random_weight(16, 24), correlated_gram(24)
    mask = wanda(weight, gram, 200)
    twice = refine(weight, refine(weight, mask, gram, 1), gram, 1)
    assert torch.equal(refine(weight, mask, gram, 2), twice)
    assert not torch.equal(refine(weight, mask, gram, 1), twice)


def test_an_optimal_mask_does_not_change():
    weight, gram = random_weight(16, 24), correlated_gram(24)
    done = refine(weight, wanda(weight, gram, 200), gram, 100)
    assert torch.equal(refine(weight, done, gram, 5), done)


@pytest.mark.parametrize("entries", [1, 50, 100])
@pytest.mark.parametrize("group", [None, 4])
def test_refining_in_pieces_changes_nothing(monkeypatch, entries, group):
    weight, gram = random_weight(7, 20), correlated_gram(20)
    mask = wanda(weight, gram, 70, group)
    whole = refine(weight, mask, gram, 3, group)
    monkeypatch.setattr("layerwise.pruners.wanda_swaps.SWEPT_ENTRIES", entries)
    assert torch.equal(refine(weight, mask, gram, 3, group), whole)


def test_zero_rounds_and_zero_rows_leave_the_mask_unchanged():
    weight, gram = random_weight(4, 8), correlated_gram(8)
    mask = wanda(weight, gram, 13)
    assert torch.equal(refine(weight, mask, gram, 0), mask)
    assert refine(torch.empty(0, 8), torch.empty(0, 8, dtype=torch.bool), gram, 3).shape == (0, 8)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_the_scale_of_the_inputs_does_not_matter(scale):
    weight, gram = random_weight(16, 24), correlated_gram(24)
    mask = wanda(weight, gram, 200)
    assert torch.equal(refine(weight, mask, gram * scale, 3), refine(weight, mask, gram, 3))


def test_zero_inputs_cause_no_swaps():
    weight, gram = random_weight(4, 8), torch.zeros(8, 8)
    mask = wanda(weight, correlated_gram(8), 16)
    assert torch.equal(refine(weight, mask, gram, 3), mask)


def test_a_weight_of_low_precision_is_compared_in_float32():
    weight, gram = random_weight(16, 24).bfloat16(), correlated_gram(24)
    mask = wanda(weight.float(), gram, 200)
    assert torch.equal(refine(weight, mask, gram, 3), refine(weight.float(), mask, gram, 3))


def test_weight_mask_and_second_moments_are_left_unchanged():
    weight, gram = random_weight(16, 24), correlated_gram(24)
    mask = wanda(weight, gram, 200)
    before = weight.clone(), mask.clone(), gram.clone()
    assert not torch.equal(refine(weight, mask, gram, 3), mask)
    assert all(map(torch.equal, (weight, mask, gram), before))


@pytest.mark.parametrize(
    "weight, mask, gram, message",
    [
        ((2, 4), (2, 3), (4, 4), r"a mask of \(2, 3\) and a Gram matrix of \(4, 4\) do not match"),
        ((2, 4), (2, 4), (3, 3), "do not match"),
        ((2, 4), (2, 4), (4, 3), "do not match"),
        ((4,), (4,), (4, 4), "do not match"),
    ],
)
def test_shapes_that_do_not_match_are_refused(weight, mask, gram, message):
    with pytest.raises(ValueError, match=message):
        refine(torch.ones(weight), torch.ones(mask) > 0, torch.ones(gram), 1)


def test_invalid_rounds_groups_and_values_are_refused():
    weight, mask, gram = torch.ones(2, 4), torch.ones(2, 4) > 0, torch.eye(4)
    with pytest.raises(ValueError, match="rounds is -1"):
        refine(weight, mask, gram, -1)
    with pytest.raises(ValueError, match="4 inputs cannot be split into groups of 3"):
        refine(weight, mask, gram, 1, group=3)
    with pytest.raises(ValueError, match="so swaps cannot be compared"):
        refine(weight * float("nan"), mask, gram, 1)
