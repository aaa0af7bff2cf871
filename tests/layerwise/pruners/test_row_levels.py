"""Levels are those of a stable sort, in every tie, with and without the kernel."""

import math
import random

import pytest
import torch
from torch import Tensor

from layerwise.pruners.masks import lowest, removal_levels
from layerwise.pruners.row_levels import levels_of_rows, ordered_integers
from layerwise.sparse import native

# Without a histogram (up to 64 columns); with bins of 10 bits; of more; at the limits of both.
WIDTHS = (*range(1, 71), 255, 256, 1000, 2048, 2049, 4097, 9000)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 1e-40, 1.0, -1.0, 65504.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["kernel", "torch"], autouse=True)
def ranking(request) -> str:
    """Rank with the kernel compiled from the current source, or without a kernel."""
    request.getfixturevalue({"kernel": "best_kernel", "torch": "no_kernel"}[request.param])
    assert (native.kernel() is None) == (request.param == "torch")
    return request.param


def sorted_levels(scores: Tensor, per_row: list[int], extra: list[int]) -> Tensor:
    """Return the levels by the definition: the position of every weight in a stable sort, against every count."""
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    rows = torch.arange(len(scores))[:, None]
    levels = torch.zeros(scores.shape, dtype=torch.uint8)
    for count, more in zip(per_row, extra, strict=True):
        levels += ranks >= count + (rows < more)
    return levels


def check(scores: Tensor, per_row: list[int], extra: list[int] | None = None) -> None:
    before = scores.clone()
    levels = levels_of_rows(scores, per_row, extra or [0] * len(per_row))
    assert levels.dtype == torch.uint8
    assert torch.equal(levels, sorted_levels(scores, per_row, extra or [0] * len(per_row)))
    assert torch.equal(scores.nan_to_num(3.0), before.nan_to_num(3.0))


def kinds_of_scores(rows: int, columns: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    random_scores = torch.randn(rows, columns, generator=generator)
    chosen = torch.randint(len(SPECIAL), (rows, columns), generator=generator)
    few_special = torch.rand(rows, columns, generator=generator) < 0.02
    special = torch.tensor(SPECIAL)[chosen]
    far = random_scores.abs().clone()
    far[:, 0] = 1e38
    far[:, columns // 2] = 0
    return {
        "random": random_scores,
        "positive": random_scores.abs(),
        "many ties": torch.randint(5, (rows, columns), generator=generator).float(),
        "all equal": torch.full((rows, columns), 0.1),
        "zeros of both signs": torch.where(random_scores > 0, 0.0, -0.0),
        "special": special,
        "a few special": torch.where(few_special, special, random_scores),
        "subnormal": random_scores * 1e-39,
        "adjacent numbers": (random_scores.view(torch.int32) & 3 | 0x3F800000).view(torch.float32),
        "a wide range": far,
        "ascending": random_scores.sort(dim=1).values,
        "descending": random_scores.sort(dim=1, descending=True).values,
    }


def counts_for(columns: int) -> list[list[int]]:
    dice = random.Random(columns)
    several = sorted(dice.choices(range(columns + 1), k=9))
    return [
        [0],
        [columns],
        [columns // 2],
        [0, 0, columns, columns],
        several,
        [count for count in several for _ in "twice"],
    ]


@pytest.mark.parametrize("columns", WIDTHS)
def test_levels_are_those_of_a_stable_sort(columns):
    for scores in kinds_of_scores(3, columns).values():
        for counts in counts_for(columns):
            check(scores, counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [7, 64, 65, 3000])
def test_levels_of_16_bit_scores_are_those_of_a_stable_sort(columns, dtype):
    for scores in kinds_of_scores(3, columns).values():
        for counts in counts_for(columns):
            check(scores.to(dtype), counts)


@pytest.mark.parametrize("columns", [8, 200, 5000])
def test_the_first_rows_lose_one_weight_more(columns):
    for scores in kinds_of_scores(5, columns).values():
        check(scores, [0, 3, 3, columns // 2, columns - 1], [2, 0, 5, 1, 3])


@pytest.mark.parametrize("columns", [300, 3000])
def test_255_counts_are_served_at_once(columns):
    for scores in kinds_of_scores(2, columns).values():
        check(scores, list(range(20, 275)))


def test_a_whole_matrix_is_one_row():
    for scores in kinds_of_scores(1, 200_000).values():
        check(scores.bfloat16(), [0, 70_000, 99_999, 100_000, 199_999])


def test_float64_scores_are_not_rounded():
    scores = 1 + torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=torch.float64) * 1e-15
    assert levels_of_rows(scores, [1, 2], [0, 0]).tolist() == [[2, 1, 2, 0]]


def test_scores_may_be_a_transposed_matrix():
    scores = torch.randn(70, 9, generator=torch.Generator().manual_seed(0)).T
    check(scores, [3, 40])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_matrix_has_no_levels(shape):
    assert levels_of_rows(torch.empty(shape), [0, 0], [0, 0]).shape == shape


def test_without_counts_every_level_is_zero():
    assert levels_of_rows(torch.ones(2, 100), [], []).eq(0).all()


def test_the_number_of_threads_does_not_change_the_levels():
    scores, threads, found = kinds_of_scores(13, 700)["many ties"], torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found.append(levels_of_rows(scores, [100, 350], [4, 0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(levels, found[0]) for levels in found)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_integers_have_the_order_of_the_scores(dtype):
    scores = torch.tensor(sorted(SPECIAL[:4] + SPECIAL[6:]), dtype=dtype)
    integers = ordered_integers(scores)
    assert torch.equal(integers[:, None] < integers, scores[:, None] < scores)
    assert torch.equal(integers[:, None] == integers, scores[:, None] == scores)
    assert (ordered_integers(torch.tensor(SPECIAL[4:6], dtype=dtype)) > integers.max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_scores_of_a_matrix_are_those_of_a_stable_sort(dtype):
    for scores in kinds_of_scores(7, 31).values():
        scores = scores.to(dtype)
        for count in (0, 1, 50, 108, 217):
            expected = sorted_levels(scores.reshape(1, -1), [count], [0]).reshape(scores.shape) == 0
            assert torch.equal(lowest(scores, count), expected)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (3, 64), (30, 96)])
def test_patterns_have_the_masks_of_a_stable_sort(pattern):
    in_group, group = pattern
    for scores in kinds_of_scores(5, 2 * 3 * 64 * 2).values():
        count = scores.numel() // group * in_group
        levels = removal_levels(scores, lambda rows: rows, [count], by_row=True, group=group)
        expected = sorted_levels(scores.reshape(-1, group), [in_group], [0])
        assert torch.equal(levels, expected.reshape(scores.shape))
