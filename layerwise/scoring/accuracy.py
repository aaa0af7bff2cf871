"""Accuracy: the share of right answers, and how sure it is; the unweighted average over several tasks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        value: in [0, 1].
        standard_error: of a mean of independent documents, by their sample variance, as lm-eval has it; None for a
            single document.
        documents: how many were answered.
    """

    value: float
    standard_error: float | None
    documents: int

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1 or self.documents < 1:
            raise ValueError(
                f"an accuracy of {self.value} on {self.documents} documents is none. It is a share of at least one."
            )


def accuracy(correct: Sequence[bool]) -> Accuracy:
    """The accuracy of answers of which is known whether they are right.

    Raises:
        ValueError: there are no answers.
    """
    if not correct:
        raise ValueError("no document was answered, so there is no accuracy. Ask at least one.")
    documents = len(correct)
    value = sum(correct) / documents
    error = math.sqrt(value * (1 - value) / (documents - 1)) if documents > 1 else None
    return Accuracy(value, error, documents)


def average(tasks: Sequence[Accuracy]) -> Accuracy:
    """The mean over tasks, each counting the same however many documents it has; its error is theirs combined."""
    documents = sum(task.documents for task in tasks)
    value = math.fsum(task.value for task in tasks) / len(tasks)
    return Accuracy(value, combined_error([task.standard_error for task in tasks]), documents)


def combined_error(errors: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent numbers; None if that of one of them is not known."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return math.sqrt(math.fsum(error**2 for error in known)) / len(known)
