"""McNemar's test: whether two models that answered the same questions differ in how many they got right.

Only the questions that exactly one of the two got right count. If the models are equally good, each of those went
to either with probability 1/2, so their split is binomial (McNemar, Psychometrika 12, 1947).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.05  # below it a difference is called significant


@dataclass(frozen=True)
class PairedAnswers:
    """How two models did on the same documents.

    Attributes:
        documents: how many both of them answered.
        only_first: how many the first one alone got right.
        only_second: how many the second one alone got right.
    """

    documents: int
    only_first: int
    only_second: int

    def __post_init__(self) -> None:
        counts = self.only_first, self.only_second
        if self.documents < 1 or min(counts) < 0 or sum(counts) > self.documents:
            raise ValueError(
                f"of {self.documents} documents {self.only_first} cannot be right with the first model alone and "
                f"{self.only_second} with the second alone. Count each document once, and at least one."
            )

    @property
    def difference(self) -> float:
        """Accuracy of the first model less that of the second, in [-1, 1]."""
        return (self.only_first - self.only_second) / self.documents

    @property
    def standard_error(self) -> float | None:
        """Of the difference, from the spread of the documents' own differences; None for a single document."""
        if self.documents < 2:
            return None
        squares = self.only_first + self.only_second  # each document's difference is -1, 0 or 1
        variance = (squares - self.documents * self.difference**2) / (self.documents - 1)
        return math.sqrt(max(variance, 0.0) / self.documents)

    @property
    def p_value(self) -> float:
        """Two-sided exact p-value: twice the smaller tail of the binomial, at most 1.

        Exact and not mid-p: what is called significant at 5 % is a false alarm in at most 5 % of all cases however
        few documents differ, and with so few questions as a CPU answers that is worth the little power it costs.
        """
        differing = self.only_first + self.only_second
        ways = tail = (
            1  # of choosing none of them; whole numbers, so that thousands of documents lose no digit
        )
        for count in range(min(self.only_first, self.only_second)):
            ways = ways * (differing - count) // (count + 1)
            tail += ways
        return min(1.0, 2 * tail / 2**differing)

    @property
    def significant(self) -> bool:
        """Whether the p-value is below ``LEVEL``."""
        return self.p_value < LEVEL


def paired_answers(first: Sequence[bool], second: Sequence[bool]) -> PairedAnswers:
    """Compare two models document by document.

    Args:
        first: whether the first model got each document right.
        second: the same for the second model, in the same order.

    Raises:
        ValueError: the models answered different numbers of documents, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"a paired comparison needs the same documents for both models; got {len(first)} and {len(second)} "
            "answers. Ask both models the same questions."
        )
    pairs = list(zip(first, second, strict=True))
    return PairedAnswers(len(pairs), sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))


def together(tasks: Sequence[PairedAnswers]) -> PairedAnswers:
    """All documents of several tasks as one: under its null hypothesis it does not matter which task one is from."""
    return PairedAnswers(
        sum(task.documents for task in tasks),
        sum(task.only_first for task in tasks),
        sum(task.only_second for task in tasks),
    )
