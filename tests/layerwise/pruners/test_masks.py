"""Masks have exact counts for any scores."""

import random

import pytest
import torch
from torch import Tensor

from layerwise.pruners.masks import count_zeros, lowest, removal_levels


def levels_of(scores: Tensor, counts: list[int], by_row: bool) -> Tensor:
    """Return the levels of weights that are their own scores."""
    return removal_levels(scores, lambda weights: weights, counts, by_row)


def random_scores(rows: int, columns: int, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    if ties:
        return torch.randint(3, (rows, columns), generator=generator).float()
    return torch.rand(rows, columns, generator=generator)


def removed_one_by_one(row: list[float], count: int) -> list[bool]:
    """Remove the smallest entry (of equal ones the first) ``count`` times."""
    left = list(enumerate(row))
    for _ in range(count):
        left.remove(min(left, key=lambda entry: (entry[1], entry[0])))
    kept = {index for index, _ in left}
    return [index not in kept for index in range(len(row))]


def test_the_lowest_scores_of_each_row_are_removed_first():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [10.0, 40.0, 20.0, 30.0]])
    assert levels_of(scores, [2, 4, 8], by_row=True).tolist() == [[2, 0, 2, 1], [0, 2, 1, 2]]


def test_the_lowest_scores_of_the_matrix_are_removed_first_regardless_of_row():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [10.0, 40.0, 20.0, 30.0]])
    assert levels_of(scores, [3, 5], by_row=False).tolist() == [[1, 0, 0, 0], [1, 2, 2, 2]]


def test_of_equal_scores_the_first_are_removed_first():
    equal = torch.ones(2, 4)
    assert (levels_of(equal, [4], by_row=True) == 0).tolist() == [[True, True, False, False]] * 2
    assert (levels_of(equal, [3], by_row=False) == 0).tolist() == [[True, True, True, False], [False] * 4]


def test_the_remainder_is_removed_from_the_first_rows():
    equal = torch.ones(3, 4)
    assert (levels_of(equal, [5], by_row=True) == 0).sum(dim=1).tolist() == [2, 2, 1]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_every_count_is_met_exactly_and_the_masks_are_nested(by_row, ties):
    scores = random_scores(7, 9, ties)
    counts = list(range(64))
    levels = levels_of(scores, counts, by_row)
    masks = [levels <= index for index in range(len(counts))]
    assert [int(mask.sum()) for mask in masks] == counts
    assert all((more | ~fewer).all() for fewer, more in zip(masks, masks[1:], strict=False))


@pytest.mark.parametrize("ties", [False, True])
def test_rows_differ_by_at_most_one_weight(ties):
    scores = random_scores(7, 9, ties)
    for count in range(64):
        in_rows = (levels_of(scores, [count], by_row=True) == 0).sum(dim=1)
        assert in_rows.max() - in_rows.min() <= 1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_masks_are_those_of_removing_weights_one_by_one(by_row, ties):
    rows, columns = 5, 6
    scores = random_scores(rows, columns, ties)
    for count in range(rows * columns + 1):
        removed = levels_of(scores, [count], by_row) == 0
        if by_row:
            in_row = [count // rows + (row < count % rows) for row in range(rows)]
            expected = [
                removed_one_by_one(row.tolist(), amount) for row, amount in zip(scores, in_row, strict=True)
            ]
            assert removed.tolist() == expected
        else:
            assert removed.flatten().tolist() == removed_one_by_one(scores.flatten().tolist(), count)


@pytest.mark.parametrize("by_row", [False, True])
def test_several_counts_at_once_give_the_masks_of_each_count_alone(by_row):
    scores, dice = random_scores(8, 16, ties=True), random.Random(0)
    for _ in range(20):
        counts = sorted(dice.choices(range(129), k=6))
        levels = levels_of(scores, counts, by_row)
        for index, count in enumerate(counts):
            assert torch.equal(levels <= index, levels_of(scores, [count], by_row) == 0)


def test_equal_counts_share_the_first_level():
    assert levels_of(torch.tensor([[2.0, 1.0]]), [0, 1, 1, 2, 2], by_row=True).tolist() == [[3, 1]]


def test_zero_counts_remove_nothing():
    assert levels_of(torch.ones(2, 2), [], by_row=True).tolist() == [[0, 0], [0, 0]]
    assert levels_of(torch.ones(2, 2), [0], by_row=False).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("by_row", [False, True])
def test_255_counts_fit_into_a_byte(by_row):
    scores = random_scores(16, 32)
    levels = levels_of(scores, list(range(1, 511, 2)), by_row)
    assert int((levels <= 254).sum()) == 509
    assert (levels == 255).sum() == 3


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("entries", [1, 7, 16, 24, 50])
def test_ranking_in_pieces_changes_nothing(monkeypatch, by_row, entries):
    scores, counts = random_scores(11, 8, ties=True), [0, 5, 17, 44, 45, 88]
    whole = levels_of(scores, counts, by_row)
    monkeypatch.setattr("layerwise.pruners.masks.RANKED_ENTRIES", entries)
    assert torch.equal(levels_of(scores, counts, by_row), whole)


def test_a_transposed_weight_is_ranked_like_a_copy_of_it(monkeypatch):
    monkeypatch.setattr("layerwise.pruners.masks.RANKED_ENTRIES", 20)
    stored = random_scores(8, 6, ties=True)
    assert torch.equal(levels_of(stored.T, [13], True), levels_of(stored.T.contiguous(), [13], True))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_an_empty_matrix_has_nothing_to_remove(shape):
    assert levels_of(torch.empty(shape), [0, 0], by_row=False).shape == shape


@pytest.mark.parametrize("rows", [0, 4])
def test_rows_without_columns_have_nothing_to_remove(rows):
    assert levels_of(torch.empty(rows, 0), [0, 0], by_row=True).shape == (rows, 0)


def test_zero_rows_have_nothing_to_remove():
    assert levels_of(torch.empty(0, 4), [0, 0], by_row=True).shape == (0, 4)


@pytest.mark.parametrize("by_row", [False, True])
def test_a_single_row_or_column_is_a_matrix_too(by_row):
    assert (levels_of(torch.tensor([[3.0, 1.0, 2.0]]), [2], by_row) == 0).tolist() == [[False, True, True]]
    assert int((levels_of(torch.tensor([[3.0], [1.0], [2.0]]), [2], by_row) == 0).sum()) == 2


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("counts", [[-1], [5], [3, 2], [-1, 2], [0, 5], [1] * 256])
def test_invalid_counts_are_refused(counts, by_row):
    with pytest.raises(ValueError, match="are invalid for a matrix of 4 weights. Pass at most 255 ascending"):
        levels_of(torch.ones(2, 2), counts, by_row)


def test_weights_are_left_unchanged():
    scores = random_scores(4, 4)
    before = scores.clone()
    levels_of(scores, [7], by_row=True)
    levels_of(scores, [7], by_row=False)
    assert torch.equal(scores, before)


def test_the_lowest_scores_are_marked_and_of_equal_ones_the_first():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 1.0]])
    assert lowest(scores, 0).sum() == 0
    assert lowest(scores, 2).tolist() == [[False, True, False], [True, False, False]]
    assert lowest(scores, 4).tolist() == [[False, True, True], [True, False, True]]
    assert lowest(scores, 6).all()


def test_in_groups_every_group_loses_the_same_number():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 7.0, 9.0]])
    levels = removal_levels(scores, lambda rows: rows, [4, 8], by_row=True, group=2)
    assert levels.tolist() == [[0, 1, 0, 1], [1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("count", "group", "named"),
    [(4, 3, "4 inputs cannot be split into groups of 3"), (3, 2, "not an integer")],
)
def test_counts_and_inputs_that_do_not_fit_the_groups_are_refused(count, group, named):
    with pytest.raises(ValueError, match=named):
        removal_levels(torch.ones(2, 4), lambda rows: rows, [count], by_row=True, group=group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zeros_of_either_sign_are_counted_in_any_layout(dtype):
    weight = torch.randn(700, 900).to(dtype)
    weight[torch.rand(weight.shape) < 0.3] = 0
    weight[torch.rand(weight.shape) < 0.3] = -0.0
    for each in (weight, weight.T, weight[::2, 1:], torch.zeros(0, 4, dtype=dtype)):
        assert count_zeros(each) == int((each == 0).sum())
