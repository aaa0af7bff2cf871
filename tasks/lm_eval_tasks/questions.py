"""Questions of a task of lm-eval: its documents, the requests about each, and the grading of the answers."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from layerwise.scoring.continuations import Score
from layerwise.storage.formats.canonical_json import digest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task


class Questions:
    """Some documents of one task. Immutable.

    This is not a dataclass, because Prefect would visit every document in it: about a millisecond each.

    Args:
        rules: the task, which grades the answers.
        document_ids: positions of the chosen documents in the data set, in rising order.
        documents: documents of the data set.
        requests: pairs of context and continuation by document, one pair for each choice.
        available: number of documents in the data set.

    Attributes:
        task: name of the task.
        version: version of the task, which its authors raise when they change it.
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
        """Digest of the full text of all requests, and of the documents with their answers.

        It changes with the data, the seed, the number of documents, and the wording in another version of lm-eval.
        The same questions have the same identity, however they were chosen.
        """
        return digest([self.version, self.document_ids, self.documents, self.requests])

    def graded(self, scores: Sequence[Score]) -> list[dict[str, bool]]:
        """Grade the answer to each document by the rules of the task: ``acc``, and ``acc_norm`` if the task has it.

        Args:
            scores: scores of all requests, document by document.

        Raises:
            ValueError: the task has answers that are partly right.
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
                f"the task {self.task} gives an answer the accuracy {grade}, but only tasks with right and wrong "
                "answers can be compared. Choose another task."
            )
        return bool(grade)


def instances_of(questions: Sequence[Questions]) -> "list[Instance]":
    """Return all requests of some tasks as instances of lm-eval, task by task and document by document."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=request, idx=0)
        for of_task in questions
        for of_document in of_task.requests
        for request in of_document
    ]
