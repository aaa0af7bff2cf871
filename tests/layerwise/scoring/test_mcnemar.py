"""McNemar's exact test, by hand and compared with the definition."""

import itertools

import pytest

from layerwise.scoring.mcnemar import PairedAnswers, paired_answers, pooled


def test_only_documents_on_which_the_models_differ_count():
    answers = paired_answers([True, True, True, False, False], [True, False, False, True, False])
    assert (answers.documents, answers.only_first, answers.only_second) == (5, 2, 1)
    assert answers.difference == pytest.approx(0.2)


@pytest.mark.parametrize(
    "only_first, only_second, p_value",
    [
        (5, 0, 2 / 32),  # both tails: all five heads, all five tails
        (0, 5, 2 / 32),
        (6, 0, 2 / 64),
        (1, 4, 2 * (1 + 5) / 32),
        (3, 3, 1.0),  # twice the half including the middle exceeds 1
        (0, 0, 1.0),
        (0, 1, 1.0),
    ],
)
def test_p_value_is_that_of_coin_tosses(only_first, only_second, p_value):
    assert PairedAnswers(100, only_first, only_second).p_value == pytest.approx(p_value)


@pytest.mark.parametrize("differing", [1, 4, 7, 10])
def test_p_value_counts_all_outcomes_that_are_at_least_as_uneven(differing):
    outcomes = [sum(throws) for throws in itertools.product((0, 1), repeat=differing)]
    for first in range(differing + 1):
        uneven = abs(2 * first - differing)
        as_uneven = sum(abs(2 * heads - differing) >= uneven for heads in outcomes)
        p_value = PairedAnswers(50, first, differing - first).p_value
        assert p_value == pytest.approx(as_uneven / len(outcomes))


def test_p_value_of_thousands_of_documents_is_still_exact():
    assert PairedAnswers(10_000, 2500, 2500).p_value == 1.0
    assert PairedAnswers(10_000, 0, 5000).p_value == 0.0  # 2 / 2**5000 underflows as a float
    # The normal approximation with continuity correction: z = (140 - 1) / sqrt(5000).
    assert PairedAnswers(10_000, 2570, 2430).p_value == pytest.approx(0.04933, abs=1e-4)


def test_6_to_0_is_significant_and_5_to_0_is_not():
    assert PairedAnswers(20, 6, 0).significant
    assert not PairedAnswers(20, 5, 0).significant


def test_standard_error_is_that_of_the_mean_of_the_differences():
    answers = paired_answers([True, True, False, True], [False, True, True, False])  # 1, 0, -1, 1
    mean, squares = 1 / 4, [(9 / 16), (1 / 16), (25 / 16), (9 / 16)]
    assert answers.difference == mean
    assert answers.standard_error == pytest.approx((sum(squares) / 3 / 4) ** 0.5)
    assert paired_answers([True], [False]).standard_error is None
    assert paired_answers([True] * 3, [False] * 3).standard_error == 0


def test_documents_of_several_tasks_are_tested_together():
    assert pooled([PairedAnswers(10, 3, 1), PairedAnswers(5, 0, 2)]) == PairedAnswers(15, 3, 3)


def test_models_that_answered_different_numbers_of_documents_are_not_compared():
    with pytest.raises(ValueError, match="got 2 and 1 answers"):
        paired_answers([True, False], [True])
    with pytest.raises(ValueError, match="got 0 and 0 answers"):
        paired_answers([], [])
    with pytest.raises(ValueError, match="do not fit 3 documents"):
        PairedAnswers(3, 2, 2)
