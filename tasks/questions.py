"""Questions: the documents of lm-eval tasks by their official names, and what a model is asked about each."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerwise.continuations import Score
from storage.keys import digest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

# Where lm-eval keeps these tasks: its index of all folders takes half a minute, that of one folder milliseconds.
FOLDERS = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "boolq": "super_glue/boolq",
    "hellaswag": "hellaswag",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "rte": "glue/rte",
    "winogrande": "winogrande",
}
SCORED = ("multiple_choice", "loglikelihood")  # the kinds of tasks that are decided by log-probabilities


@dataclass(frozen=True)
class Questions:
    """Some documents of one task.

    Attributes:
        task: its name.
        version: the task's own, which its authors raise when they change it.
        available: how many documents there are.
        document_ids: of those that are asked, rising: their places among all.
        documents: as the task's data set has them.
        requests: by document, its pairs of context and continuation, one for each choice.
    """

    task: str
    version: str
    available: int
    document_ids: tuple[int, ...]
    documents: tuple[Mapping[str, Any], ...]
    requests: tuple[tuple[tuple[str, str], ...], ...]
    rules: "Task" = field(repr=False, compare=False)  # says which answers are right

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
            metrics = self.rules.process_results(document, results)
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


def load_questions(names: Sequence[str], documents: int | None = None, seed: int = 0) -> list[Questions]:
    """Load tasks of lm-eval with some of their documents, without examples (zero-shot).

    Args:
        names: as lm-eval knows them, such as ``arc_easy``; or paths of YAML files with tasks of one's own.
        documents: at most so many of each task, drawn at random; all if None. With the same seed a larger number has
            the documents of a smaller one among its own.
        seed: of the draw.

    Raises:
        ValueError: for a name that lm-eval does not know, or a task that is not decided by log-probabilities.
        OSError: if a task's data set is neither in the cache nor reachable.
        ImportError: if lm-eval is not installed.
    """
    if documents is not None and documents < 1:
        raise ValueError(
            f"{documents} documents of each task were asked for. Ask for at least one, or None for all."
        )
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"the tasks are {', '.join(names) or 'none'}. Name at least one, and each of them once."
        )
    manager = _manager(names)
    _check_names(names, manager)
    return [_questions(_loaded(name, manager), documents, seed) for name in names]


def _manager(names: Sequence[str]) -> "TaskManager":
    """Knows the folders of the tasks that are asked for; all of lm-eval's only if there is no other way."""
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError(
            f"zero-shot tasks need lm-eval, which cannot be imported ({error}). "
            "pip install layerwise-pruning[zeroshot]"
        ) from error
    official = [name for name in names if not _is_file(name)]
    if not all(name in FOLDERS for name in official):
        return lm_eval.tasks.TaskManager()
    root = Path(next(iter(lm_eval.tasks.__path__)))
    folders: list[str | Path] = [root / folder for folder in sorted({FOLDERS[name] for name in official})]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _check_names(names: Sequence[str], manager: "TaskManager") -> None:
    for name in names:
        if _is_file(name):
            if not Path(name).is_file():
                raise ValueError(f"there is no file {name} with a task. Check the path.")
        elif name in {*manager.all_groups, *manager.all_tags} - set(manager.all_subtasks):
            raise ValueError(f"{name} is a group of lm-eval's tasks, not a task. Name the tasks themselves.")
        elif name not in manager.all_subtasks:
            similar = difflib.get_close_matches(name, [*FOLDERS, *manager.all_subtasks], n=4)
            hint = (
                f"did you mean {' or '.join(dict.fromkeys(similar))}?" if similar else "check its spelling."
            )
            raise ValueError(f"lm-eval knows no task {name!r}; {hint}")


def _loaded(name: str, manager: "TaskManager") -> "Task":
    """The task, with its data set.

    Raises:
        ValueError: if it is not decided by log-probabilities.
        OSError: if there is no data.
    """
    try:
        (task,) = manager.load([name])["tasks"].values()
    except OSError as error:  # datasets' own errors are OSErrors, too
        raise OSError(
            f"the data of the task {name} cannot be loaded ({error}). Connect to the Hugging Face Hub once, or let "
            "HF_DATASETS_CACHE name a folder that has it and set HF_HUB_OFFLINE=1."
        ) from error
    if task.OUTPUT_TYPE not in SCORED or "acc" not in task.aggregation():
        raise ValueError(
            f"the task {name} is of the kind {task.OUTPUT_TYPE} with the metrics {', '.join(task.aggregation())}. Only "
            f"{' and '.join(SCORED)} tasks with the metric acc can be compared here. Choose another."
        )
    if task.get_config("filter_list") is not None:
        raise ValueError(
            f"the task {name} filters the model's answers, which is not supported. Choose another."
        )
    task.set_config(key="num_fewshot", value=0)
    return task


def _questions(task: "Task", documents: int | None, seed: int) -> Questions:
    available = len(task.eval_docs)
    chosen = None if documents is None or documents >= available else _drawn(available, documents, seed)
    # Rising: lm-eval takes them in the order of the data set, whatever the order they are given in.
    task.build_all_requests(samples=chosen)
    asked: dict[int, list[Any]] = {}
    for instance in task.instances:
        asked.setdefault(instance.doc_id, []).append(instance)
    return Questions(
        task.task_name,
        str(task.VERSION),
        available,
        tuple(range(available) if chosen is None else chosen),
        tuple(instances[0].doc for instances in asked.values()),
        tuple(tuple(instance.args for instance in instances) for instances in asked.values()),
        task,
    )


def _drawn(available: int, documents: int, seed: int) -> list[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return sorted(torch.randperm(available, generator=generator)[:documents].tolist())


def instances_of(questions: Sequence[Questions]) -> "list[Instance]":
    """All requests of some tasks, task by task and document by document, as lm-eval's language models take them."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=request, idx=0)
        for of_task in questions
        for of_document in of_task.requests
        for request in of_document
    ]
