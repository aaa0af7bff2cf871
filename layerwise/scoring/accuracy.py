"""Accuracy: fraction of correct answers with its standard error, and averages over tasks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """Fraction of correct answers.

    Attributes:
        value: fraction, in [0, 1].
        standard_error: standard error of the mean of independent documents, from their sample variance, as in lm-eval;
            None for a single document.
        documents: number of answered documents.
    """

    value: float
    standard_error: float | None
    documents: int

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1 or self.documents < 1:
            raise ValueError(
                f"an accuracy of {self.value} on {self.documents} documents is invalid. It must be a fraction in "
                "[0, 1] of at least one document."
            )


def accuracy(correct: Sequence[bool]) -> Accuracy:
    """Compute the accuracy of a list of answers.

    Args:
        correct: for each document, whether its answer is correct.

    Raises:
        ValueError: there are no answers.
    """
    if not correct:
        raise ValueError("the accuracy of 0 documents is undefined. Answer at least one document.")
    documents = len(correct)
    value = sum(correct) / documents
    error = math.sqrt(value * (1 - value) / (documents - 1)) if documents > 1 else None
    return Accuracy(value, error, documents)


def average(tasks: Sequence[Accuracy]) -> Accuracy:
    """Return the unweighted mean over tasks, with the combined standard error."""
    documents = sum(task.documents for task in tasks)
    value = math.fsum(task.value for task in tasks) / len(tasks)
    return Accuracy(value, combined_error([task.standard_error for task in tasks]), documents)


def combined_error(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of the mean of independent numbers; None if one of their errors is unknown."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return math.sqrt(math.fsum(error**2 for error in known)) / len(known)


def average_by_size(values: Sequence[float], documents: Sequence[int]) -> float:
    """Return the mean over tasks in which a task weighs as much as it has documents."""
    return math.fsum(value * count for value, count in zip(values, documents, strict=True)) / sum(documents)


def pooled_error(errors: Sequence[float | None], documents: Sequence[int]) -> float | None:
    """Return the standard error of ``average_by_size``, from the pooled variance inside the tasks, as lm-eval does.

    Args:
        errors: standard error of every task; None if it is unknown.

    Returns:
        None if an error is unknown.
    """
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    total = sum(documents)
    squares = math.fsum((count - 1) * count * error**2 for error, count in zip(known, documents, strict=True))
    return math.sqrt(squares / (total - len(documents)) / total)
