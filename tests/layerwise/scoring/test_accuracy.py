"""Accuracy with its standard error, and the average over tasks."""

import statistics

import pytest

from layerwise.scoring.accuracy import Accuracy, accuracy, average, combined_error


def test_an_accuracy_is_the_mean_with_its_standard_error():
    right = [True, True, True, False]
    found = accuracy(right)
    assert found == Accuracy(0.75, pytest.approx(statistics.stdev(right) / 4**0.5), 4)


def test_one_document_has_no_standard_error():
    assert accuracy([True]) == Accuracy(1.0, None, 1)


def test_every_task_has_the_same_weight_in_the_average():
    found = average([Accuracy(0.5, 0.03, 100), Accuracy(0.8, 0.04, 20)])
    assert found.value == pytest.approx(0.65)
    assert found.standard_error == pytest.approx(0.05 / 2)
    assert found.documents == 120


def test_the_average_has_no_standard_error_if_a_task_has_none():
    assert average([Accuracy(0.5, 0.03, 100), Accuracy(1.0, None, 1)]).standard_error is None
    assert combined_error([3.0, 4.0]) == pytest.approx(2.5)


def test_an_invalid_accuracy_is_refused():
    with pytest.raises(ValueError, match="accuracy of 0 documents is undefined"):
        accuracy([])
    with pytest.raises(ValueError, match="an accuracy of 1.5"):
        Accuracy(1.5, None, 3)
