"""Load tasks of lm-eval by their official names, with some of their documents."""

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

# The line that names the task in its file. lm-eval's own index of its 14,000 files parses them all: 20 to 40 s.
NAMED = re.compile(r"""^["']?task["']?[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
# What lm-eval and the templates of a task raise if the file or the data are wrong.
STUMBLES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SyntaxError, TemplateError),
    *(TypeError, ValueError),
)
SCORED = ("multiple_choice", "loglikelihood")  # the kinds of tasks that are decided by log-probabilities


def load_questions(
    names: Sequence[str], documents: int | None = None, seed: int = 0, trust_task_code: bool = False
) -> list[Questions]:
    """Load tasks of lm-eval with some of their documents, without examples (zero-shot).

    Templates of all tasks are rendered in Jinja's sandbox, out of which no Python object is reached.

    Args:
        names: as lm-eval knows them, such as ``arc_easy``; or paths of YAML files with tasks of one's own.
        documents: at most so many of each task, drawn at random; all if None. With the same seed a larger number has
            the documents of a smaller one among its own.
        seed: of the draw.
        trust_task_code: run the code that YAML files outside of lm-eval's own folder ask for. It decides nothing about
            results: what is asked is part of the questions' identity, word for word.

    Raises:
        ValueError: for a name that lm-eval does not know, a task that is not decided by log-probabilities, or a file
            that asks to run code which is not trusted.
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
    files = _files(names)
    _render_in_sandbox()
    tasks = [_loaded(name, file, trust_task_code) for name, file in zip(names, files, strict=True)]
    if len({task.task_name for task in tasks}) < len(tasks):
        raise ValueError(
            f"{', '.join(names)} are the tasks {', '.join(task.task_name for task in tasks)}: some have the same name. "
            "Leave one out, or give your own another name."
        )
    return [_questions(task, documents, seed) for task in tasks]


def _render_in_sandbox() -> None:
    """Have lm-eval render templates by an environment that refuses what leads to Python's internals."""
    import lm_eval.utils

    if not isinstance(lm_eval.utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(
            loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
        )
        sandbox.filters |= lm_eval.utils.env.filters
        lm_eval.utils.env = sandbox


def _files(names: Sequence[str]) -> list[Path]:
    """The file that each of the tasks is in."""
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError(
            f"zero-shot tasks need lm-eval, which cannot be imported ({error}). "
            "pip install layerwise-pruning[zeroshot]"
        ) from error
    own = {name: Path(name) for name in names if name.endswith((".yaml", ".yml"))}
    if missing := [name for name, file in own.items() if not file.is_file()]:
        raise ValueError(f"there is no file {' and no file '.join(missing)} with a task. Check the path.")
    files: dict[str, Path] = {}
    if len(own) < len(names):
        for file in Path(next(iter(lm_eval.tasks.__path__))).glob("**/*.yaml"):
            files |= dict.fromkeys(NAMED.findall(file.read_text(encoding="utf-8")), file)
    return [own[name] if name in own else _file_of(name, files) for name in names]


def _file_of(name: str, files: Mapping[str, Path]) -> Path:
    if name not in files:
        similar = difflib.get_close_matches(name, files, n=3)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else "Check its spelling."
        raise ValueError(
            f"lm-eval has no task {name!r} ({len(files)} are known; groups of tasks are not taken). {hint}"
        )
    return files[name]


def _loaded(name: str, file: Path, trust_task_code: bool) -> "Task":
    """The task, with its data set.

    Args:
        trust_task_code: of a file that is not lm-eval's own, too.

    Raises:
        ValueError: if it is not decided by log-probabilities.
        OSError: if there is no data.
    """
    import lm_eval.tasks
    from datasets.exceptions import DatasetsError

    own = file.resolve().is_relative_to(Path(next(iter(lm_eval.tasks.__path__))).resolve())
    described = str(file) if own or trust_task_code else read_task(file)
    try:
        (task,) = lm_eval.tasks.TaskManager(include_defaults=False).load([described])["tasks"].values()
    except (
        TemplateError
    ) as error:  # one that includes another template, which is not there, is an OSError, too
        raise ValueError(_what_is_wrong(name, error)) from error
    except OSError as error:  # errors of datasets about what is not there are OSErrors, too
        raise OSError(
            f"the data of the task {name} cannot be loaded ({error}). Connect to the Hugging Face Hub once, or let "
            "HF_DATASETS_CACHE name a folder that has it and set HF_HUB_OFFLINE=1."
        ) from error
    except (*STUMBLES, DatasetsError) as error:
        raise ValueError(_what_is_wrong(name, error)) from error
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


def _what_is_wrong(name: str, error: Exception) -> str:
    if isinstance(error, TemplateError):
        return (
            f"a template of the task {name} cannot be rendered ({' '.join(str(error).split())}). Correct it: templates "
            "may use the fields of a document, filters and the methods of their values, and nothing that begins with "
            "an underscore."
        )
    reason = error.__cause__ or error  # datasets says that it failed, and the error before that why
    return (
        f"the task {name} cannot be loaded ({reason!r}). Check that its file describes one task, not a group, and that "
        "its data set has what the file says."
    )


def _questions(task: "Task", documents: int | None, seed: int) -> Questions:
    available = len(task.eval_docs)
    chosen = None if documents is None or documents >= available else _drawn(available, documents, seed)
    try:
        # Rising: lm-eval takes them in the order of the data set, whatever the order they are given in.
        task.build_all_requests(samples=chosen)
    except STUMBLES as error:
        raise ValueError(_what_is_wrong(task.task_name, error)) from error
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
