"""Questions of a task of lm-eval: its documents, the requests about each, and the grading of the answers."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from layerwise.scoring.continuations import Score
from layerwise.storage.formats.canonical_json import digest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

GENERATED = "generate_until"  # output type of tasks whose answers the model writes
ACCURACY = "acc"  # outcome of tasks that are scored by log-probabilities
DEFAULT_ANSWER_TOKENS = 256  # lm-eval's maximum length of an answer, if the task has none
# Entries of generation_kwargs with the maximum length, in lm-eval's order of precedence.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Response:
    """Answer that a model wrote to one document.

    Attributes:
        text: the answer, without the stop sequence at its end.
        tokens: length of the text, in tokens of the model's tokenizer.
        cut: whether the answer has the maximum length, and neither a stop sequence nor the last token of a text.
        truncated: whether tokens at the start of the prompt were left out, because the model has too few positions.
    """

    text: str
    tokens: int
    cut: bool
    truncated: bool = False


Answer = Score | Response


class Questions:
    """Some documents of one task. Immutable.

    This is not a dataclass, because Prefect would visit every document in it: about a millisecond each.

    Args:
        rules: the task, which grades the answers.
        document_ids: positions of the chosen documents in the data set, in rising order.
        documents: documents of the data set.
        requests: requests by document. For log-probabilities: pairs of context and continuation, one pair for each
            choice. For generated answers: one pair of the prompt and the task's ``generation_kwargs``.
        available: number of documents in the data set.
        shots: number of examples in front of every document.

    Attributes:
        task: name of the task.
        version: version of the task, which its authors raise when they change it.
        generated: whether the model writes its answers.
    """

    def __init__(
        self,
        rules: "Task",
        document_ids: Sequence[int],
        documents: Sequence[Mapping[str, Any]],
        requests: Sequence[Sequence[tuple[str, Any]]],
        available: int,
        shots: int = 0,
    ) -> None:
        self.task, self.version = rules.task_name, str(rules.VERSION)
        self.document_ids, self.documents, self.requests = document_ids, documents, requests
        self.available, self.shots = available, shots
        self.generated = rules.OUTPUT_TYPE == GENERATED
        self._rules = rules

    @property
    def count(self) -> int:
        """Number of requests."""
        return sum(map(len, self.requests))

    @property
    def answer_tokens(self) -> int:
        """Maximum number of tokens of an answer that the model writes; 0 for tasks without such answers."""
        if not self.generated:
            return 0
        options = self.requests[0][0][1]
        return next(
            (int(options[name]) for name in LENGTHS if options.get(name) is not None), DEFAULT_ANSWER_TOKENS
        )

    @cached_property
    def identity(self) -> str:
        """Digest of the full text of all requests, and of the documents with their answers.

        It changes with the data, the seed, the number of documents and examples, and the wording in another version of
        lm-eval. The same questions have the same identity, however they were chosen. For generated answers it includes
        the filters and metrics, which a user may change without another version.
        """
        parts = [self.version, self.document_ids, self.documents, self.requests]
        if self.generated:
            config = self._rules.config
            rules = [config.filter_list, config.metric_list, config.process_results]
            parts.append([_described(rule) for rule in rules])
        return digest(parts)

    @cached_property
    def outcomes(self) -> tuple[str, ...]:
        """Names of the metrics that say whether an answer is right, as lm-eval names them; the first one is compared.

        For generated answers, these are the metrics whose mean is taken and that grade an empty answer by 0 or 1; there may
        be none.
        """
        if not self.generated:
            return (ACCURACY,)
        from lm_eval.api.metrics import mean

        averaged = {name for name, of_task in self._rules.aggregation().items() if of_task is mean}
        grades = self._grades([Response("", 0, cut=False)], self.documents[:1])[0]
        return tuple(
            name
            for name, grade in grades.items()
            if name.partition(",")[0] in averaged and _is_right_or_wrong(grade)
        )

    def graded(self, answers: Sequence[Answer]) -> list[dict[str, bool]]:
        """Grade the answer to each document by the rules of the task.

        Args:
            answers: answers to all requests, document by document.

        Returns:
            For log-probabilities: ``acc``, and ``acc_norm`` if the task has it. For generated answers: ``outcomes``.

        Raises:
            ValueError: the task has answers that are partly right.
        """
        names = self.outcomes if self.generated else (ACCURACY, "acc_norm")
        return [
            {name: self._right(name, metrics[name]) for name in names if name in metrics}
            for metrics in self._grades(answers, self.documents)
        ]

    def _grades(
        self, answers: Sequence[Answer], documents: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return all metrics of each document; the name of a metric is followed by that of its filter, if it has one."""
        if self.generated:
            return self._grades_of_text([answer.text for answer in answers], documents)  # type: ignore[union-attr]
        found, start = [], 0
        for document, requests in zip(documents, self.requests, strict=False):
            own = answers[start : start + len(requests)]
            start += len(requests)
            results = [(score.log_probability, score.greedy) for score in own]  # type: ignore[union-attr]
            found.append(self._rules.process_results(document, results))
        return found

    def _grades_of_text(
        self, texts: Sequence[str], documents: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        instances = instances_of([self])[: len(documents)]
        for instance, text, document in zip(instances, texts, documents, strict=True):
            instance.doc, instance.resps = dict(document), [text]
        for ensemble in self._rules._filters:  # the public apply_filters would need the instances of the task
            ensemble.apply(instances)
        grades: list[dict[str, Any]] = [{} for _ in documents]
        for name in instances[0].filtered_resps:
            end = "" if name == "none" else f",{name}"
            for document, instance, grade in zip(documents, instances, grades, strict=True):
                metrics = self._rules.process_results(document, [instance.filtered_resps[name]])
                grade |= {f"{metric}{end}": value for metric, value in metrics.items()}
        return grades

    def _right(self, name: str, grade: Any) -> bool:
        if not _is_right_or_wrong(grade):
            raise ValueError(
                f"the task {self.task} gives an answer the {_spoken(name)} {grade}, but only tasks with right and wrong "
                "answers can be compared. Choose another task."
            )
        return bool(grade)


def instances_of(questions: Sequence[Questions]) -> "list[Instance]":
    """Return all requests of some tasks as instances of lm-eval, task by task and document by document."""
    from lm_eval.api.instance import Instance

    return [
        Instance(
            request_type=GENERATED if of_task.generated else "loglikelihood",
            doc={},
            arguments=request,
            idx=0,
        )
        for of_task in questions
        for of_document in of_task.requests
        for request in of_document
    ]


def _is_right_or_wrong(grade: Any) -> bool:
    return not isinstance(grade, (list, tuple, dict, str)) and grade in (0, 1)


def _spoken(name: str) -> str:
    return "accuracy" if name == ACCURACY else name


def _described(rule: Any) -> Any:
    """Return filters or metrics as plain data; a function is replaced by its source."""
    if isinstance(rule, Mapping):
        return {str(name): _described(value) for name, value in rule.items()}
    if isinstance(rule, (list, tuple)):
        return [_described(each) for each in rule]
    return inspect.getsource(rule) if callable(rule) else rule
