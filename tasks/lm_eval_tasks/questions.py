"""Questions: documents of a task of lm-eval, what a model is asked about each, and which answers are right."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from layerwise.scoring.continuations import Score
from layerwise.storage.formats.canonical_json import digest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task


class Questions:
    """Some documents of one task. Nothing in it is ever changed.

    No dataclass: Prefect would look into every document of a task's arguments, a millisecond for each.

    Args:
        rules: the task itself, which says what answer is right.
        document_ids: of the documents that are asked, rising: their places among all.
        documents: as the task's data set has them.
        requests: by document, its pairs of context and continuation, one for each choice.
        available: how many documents there are.

    Attributes:
        task: its name.
        version: the task's own, which its authors raise when they change it.
    """

    def __init__(
        self,
        rules: "Task",
        document_ids: Sequence[int],
        documents: Sequence[Mapping[str, Any]],
        requests: Sequence[Sequence[tuple[str, str]]],
        available: int,
    ) -> None:
        self.task, self.version = rules.task_name, str(rules.VERSION)
        self.document_ids, self.documents, self.requests = document_ids, documents, requests
        self.available = available
        self._rules = rules

    @property
    def count(self) -> int:
        """Number of requests."""
        return sum(map(len, self.requests))

    @cached_property
    def identity(self) -> str:
        """Digest of everything that is asked, word for word, and of the documents with their answers.

        Data that changes under its name, another seed or number of documents, or another wording in a newer version of
        lm-eval give another identity; the same questions chosen in another way have the same.
        """
        return digest([self.version, self.document_ids, self.documents, self.requests])

    def graded(self, scores: Sequence[Score]) -> list[dict[str, bool]]:
        """By the task's own rules, whether each document was answered right: ``acc``, and ``acc_norm`` if it has that.

        Args:
            scores: of all requests, document by document.

        Raises:
            ValueError: the task also knows answers that are right in part.
        """
        found, start = [], 0
        for document, requests in zip(self.documents, self.requests, strict=True):
            results = [
                (score.log_probability, score.greedy) for score in scores[start : start + len(requests)]
            ]
            start += len(requests)
            metrics = self._rules.process_results(document, results)
            found.append(
                {name: self._right(metrics[name]) for name in ("acc", "acc_norm") if name in metrics}
            )
        return found

    def _right(self, grade: float) -> bool:
        if grade not in (0, 1):
            raise ValueError(
                f"the task {self.task} gives an answer the accuracy {grade}. Only answers that are right or wrong can "
                "be compared. Choose another task."
            )
        return bool(grade)


def instances_of(questions: Sequence[Questions]) -> "list[Instance]":
    """All requests of some tasks, task by task and document by document, as lm-eval's language models take them."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=request, idx=0)
        for of_task in questions
        for of_document in of_task.requests
        for request in of_document
    ]
