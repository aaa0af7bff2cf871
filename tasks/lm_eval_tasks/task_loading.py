"""Load tasks of lm-eval, by name or from a file, with some of their documents."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import BaseLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from layerwise.tasks.lm_eval_tasks.questions import Questions
from layerwise.tasks.lm_eval_tasks.task_file import read_task

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# Line with the name of the task in its file. lm-eval's own index would parse all of its 14,000 files: 20 to 40 s.
TASK_NAME = re.compile(r"""^["']?task["']?[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
# Exceptions of lm-eval and of task templates if the file or the data are wrong.
TASK_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SyntaxError, TemplateError),
    *(TypeError, ValueError),
)
SCORED = ("multiple_choice", "loglikelihood")  # output types that are scored by log-probabilities


def load_questions(
    names: Sequence[str], documents: int | None = None, seed: int = 0, trust_task_code: bool = False
) -> list[Questions]:
    """Load tasks of lm-eval with some of their documents, without examples (zero-shot).

    The templates of all tasks are rendered in Jinja's sandbox, which gives no access to Python objects.

    Args:
        names: names of lm-eval, such as ``arc_easy``, or paths of YAML files with tasks.
        documents: maximum number of documents of each task, drawn at random; None for all. With the same seed, a
            larger number includes the documents of a smaller one.
        seed: seed of the random draw.
        trust_task_code: run the code that YAML files outside of lm-eval's own folder name. This is not part of any
            key, because the identity of the questions includes their full text.

    Raises:
        ValueError: lm-eval does not know a name, a task is not scored by log-probabilities, or a file that is not
            trusted names code to run.
        OSError: the data set of a task is neither in the cache nor reachable.
        ImportError: lm-eval is not installed.
    """
    if documents is not None and documents < 1:
        raise ValueError(f"the number of documents is {documents}. Give at least 1, or None for all.")
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"the tasks are {', '.join(names) or 'none'}. Give at least one task, and each task only once."
        )
    files = _files(names)
    _render_in_sandbox()
    tasks = [_loaded(name, file, trust_task_code) for name, file in zip(names, files, strict=True)]
    if len({task.task_name for task in tasks}) < len(tasks):
        raise ValueError(
            f"{', '.join(names)} are the tasks {', '.join(task.task_name for task in tasks)}, and some have the same "
            "name. Remove one, or rename the task in your file."
        )
    return [_questions(task, documents, seed) for task in tasks]


def _render_in_sandbox() -> None:
    """Replace lm-eval's template environment by a sandbox that refuses access to Python's internals."""
    import lm_eval.utils

    if not isinstance(lm_eval.utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(
            loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
        )
        sandbox.filters |= lm_eval.utils.env.filters
        lm_eval.utils.env = sandbox


def _files(names: Sequence[str]) -> list[Path]:
    """Return the file of each task."""
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError(
            f"zero-shot tasks need lm-eval, which cannot be imported ({error}). "
            "Run pip install layerwise-pruning[zeroshot]."
        ) from error
    own = {name: Path(name) for name in names if name.endswith((".yaml", ".yml"))}
    if missing := [name for name, file in own.items() if not file.is_file()]:
        raise ValueError(f"there is no task file {' and no task file '.join(missing)}. Check the path.")
    files: dict[str, Path] = {}
    if len(own) < len(names):
        for file in Path(next(iter(lm_eval.tasks.__path__))).glob("**/*.yaml"):
            files |= dict.fromkeys(TASK_NAME.findall(file.read_text(encoding="utf-8")), file)
    return [own[name] if name in own else _file_of(name, files) for name in names]


def _file_of(name: str, files: Mapping[str, Path]) -> Path:
    if name not in files:
        similar = difflib.get_close_matches(name, files, n=3)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else "Check its spelling."
        raise ValueError(
            f"lm-eval has no task {name!r} (it has {len(files)}; groups of tasks are not supported). {hint}"
        )
    return files[name]


def _loaded(name: str, file: Path, trust_task_code: bool) -> "Task":
    """Load the task with its data set.

    Raises:
        ValueError: the task cannot be loaded, or it is not scored by log-probabilities.
        OSError: the data cannot be loaded.
    """
    import lm_eval.tasks
    from datasets.exceptions import DatasetsError

    own = file.resolve().is_relative_to(Path(next(iter(lm_eval.tasks.__path__))).resolve())
    described = str(file) if own or trust_task_code else read_task(file)
    try:
        (task,) = lm_eval.tasks.TaskManager(include_defaults=False).load([described])["tasks"].values()
    except TemplateError as error:  # before OSError: TemplateNotFound is both
        raise ValueError(_loading_problem(name, error)) from error
    except OSError as error:  # before DatasetsError: errors of datasets about missing data are both
        raise OSError(
            f"the data of the task {name} cannot be loaded ({error}). Connect to the Hugging Face Hub once, or set "
            "HF_DATASETS_CACHE to a folder that has the data and HF_HUB_OFFLINE=1."
        ) from error
    except (*TASK_ERRORS, DatasetsError) as error:
        raise ValueError(_loading_problem(name, error)) from error
    if task.OUTPUT_TYPE not in SCORED or "acc" not in task.aggregation():
        raise ValueError(
            f"the task {name} has the output type {task.OUTPUT_TYPE} and the metrics {', '.join(task.aggregation())}. "
            f"Only {' and '.join(SCORED)} tasks with the metric acc can be compared. Choose another task."
        )
    if task.get_config("filter_list") is not None:
        raise ValueError(
            f"the task {name} filters the model's answers, which is not supported. Choose another task."
        )
    task.set_config(key="num_fewshot", value=0)
    return task


def _loading_problem(name: str, error: Exception) -> str:
    if isinstance(error, TemplateError):
        return (
            f"a template of the task {name} cannot be rendered ({' '.join(str(error).split())}). Correct it: templates "
            "may use the fields of a document, filters, and methods of values, but no names that begin with an "
            "underscore."
        )
    reason = error.__cause__ or error  # the error of datasets has the reason in its cause
    return (
        f"the task {name} cannot be loaded ({reason!r}). Check that its file describes one task, not a group, and that "
        "its data set matches the file."
    )


def _questions(task: "Task", documents: int | None, seed: int) -> Questions:
    available = len(task.eval_docs)
    chosen = None if documents is None or documents >= available else _drawn(available, documents, seed)
    try:
        # chosen is in rising order, because lm-eval ignores its order and uses that of the data set.
        task.build_all_requests(samples=chosen)
    except TASK_ERRORS as error:
        raise ValueError(_loading_problem(task.task_name, error)) from error
    asked: dict[int, list[Any]] = {}
    for instance in task.instances:
        asked.setdefault(instance.doc_id, []).append(instance)
    return Questions(
        task,
        document_ids=tuple(range(available) if chosen is None else chosen),
        documents=[instances[0].doc for instances in asked.values()],
        requests=[[instance.args for instance in instances] for instances in asked.values()],
        available=available,
    )


def _drawn(available: int, documents: int, seed: int) -> list[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return sorted(torch.randperm(available, generator=generator)[:documents].tolist())
