"""Load tasks of lm-eval, by name or from a file, with some of their documents."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import BaseLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from layerwise.tasks.lm_eval_tasks.questions import ACCURACY, GENERATED, LENGTHS, Questions
from layerwise.tasks.lm_eval_tasks.task_file import read_task
from layerwise.tasks.lm_eval_tasks.task_groups import TaskGroup, averaged_groups

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict

# Lines with the name of a task or a group in its file. lm-eval's own index would parse all of its 14,000 files: 20 to 40 s.
# It is needed only for groups.
TASK_NAME = re.compile(r"""^["']?task["']?[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
GROUP_NAME = re.compile(r"""^["']?group["']?[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
WITH_SHOTS = re.compile(r"(.+):(\d+)", re.DOTALL)  # name of a task, with the number of examples
# Exceptions of lm-eval and of task templates if the file or the data are wrong.
TASK_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SyntaxError, TemplateError),
    *(TypeError, ValueError),
)
SCORED = ("multiple_choice", "loglikelihood")  # output types that are scored by log-probabilities
# Examples in front of each document, as in the papers on ATP and Wanda. Other tasks that are scored by log-probabilities
# get none, and other tasks with generated answers as many as their file says.
SHOTS = dict.fromkeys(("mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"), 5) | {
    "gsm8k": 8
}
FEWSHOT_SEED = 1234  # lm-eval's own seed of the draw of examples
# Entries of generation_kwargs that decide what is generated. Others may load code: transformers' custom_generate.
GENERATION = {
    *LENGTHS,
    *(
        "do_sample",
        "no_repeat_ngram_size",
        "num_beams",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    ),
    "until",
}


@dataclass(frozen=True)
class LoadedTasks:
    """Questions of all tasks, and the groups that they are averaged in."""

    questions: tuple[Questions, ...]
    groups: tuple[TaskGroup, ...] = ()


def load_tasks(
    names: Sequence[str],
    documents: int | None = None,
    seed: int = 0,
    trust_task_code: bool = False,
    fewshot: int | None = None,
) -> LoadedTasks:
    """Load tasks of lm-eval with some of their documents, and with examples in front of each document.

    The examples are those that lm-eval draws for these documents with its own seed. The templates of all tasks are
    rendered in Jinja's sandbox, which gives no access to Python objects.

    Args:
        names: names of tasks or groups of lm-eval, such as ``arc_easy``, or paths of YAML files with tasks. A number of
            examples may follow: ``mmlu:5``.
        documents: maximum number of documents of each task, drawn at random; None for all. With the same seed, a
            larger number includes the documents of a smaller one.
        seed: seed of the random draw.
        trust_task_code: run the code that YAML files outside of lm-eval's own folder name. This is not part of any
            key, because the identity of the questions includes their full text.
        fewshot: number of examples for tasks without a number; tasks whose file says 0 get none, as in lm-eval. None:
            ``SHOTS``.

    Raises:
        ValueError: lm-eval does not know a name; a task is neither scored by log-probabilities nor graded as right or
            wrong; its answers are drawn at random; it has too few examples; or a file that is not trusted names code.
        OSError: the data set of a task is neither in the cache nor reachable.
        ImportError: lm-eval or a package that a task needs is not installed.
    """
    if documents is not None and documents < 1:
        raise ValueError(f"the number of documents is {documents}. Give at least 1, or None for all.")
    asked = [_asked(name) for name in names]
    if not names or len({name for name, _ in asked}) < len(names):
        raise ValueError(
            f"the tasks are {', '.join(names) or 'none'}. Give at least one task, and each task only once."
        )
    files = _files([name for name, _ in asked])
    _render_in_sandbox()
    questions: list[Questions] = []
    groups: list[TaskGroup] = []
    for (name, shots), file in zip(asked, files, strict=True):
        tasks, group = _loaded(name, file, trust_task_code)
        for task in tasks:
            _check_output(task)
            examples = _shots(name, task, shots, fewshot)
            questions.append(_questions(task, documents, seed, examples))
        if group is not None:
            own = questions[len(questions) - len(tasks) :]
            groups += averaged_groups(group, {of_task.task: of_task.outcomes[0] for of_task in own})
    found = [of_task.task for of_task in questions]
    if len(set(found)) < len(found):
        raise ValueError(
            f"{', '.join(names)} are the tasks {', '.join(found)}, and some have the same "
            "name. Remove one, or rename the task in your file."
        )
    return LoadedTasks(tuple(questions), tuple(groups))


def _asked(name: str) -> tuple[str, int | None]:
    """Return the name of a task and its number of examples."""
    match = WITH_SHOTS.fullmatch(name)
    return (name, None) if match is None else (match[1], int(match[2]))


def _shots(name: str, task: "Task", asked: int | None, fewshot: int | None) -> int:
    """Return the number of examples of a task that was asked for by ``name``, itself or its group."""
    own = task.get_config("num_fewshot")
    if asked is not None:
        if asked and own == 0:
            raise ValueError(
                f"{name}:{asked} asks for {asked} examples, but the file of the task {task.task_name} sets num_fewshot "
                "to 0, which lm-eval never changes. Leave the number out."
            )
        return asked
    if fewshot is not None:
        return 0 if own == 0 else fewshot
    if name in SHOTS:
        return SHOTS[name]
    return int(own or 0) if task.OUTPUT_TYPE == GENERATED else 0


def _render_in_sandbox() -> None:
    """Replace lm-eval's template environment by a sandbox that refuses access to Python's internals."""
    import lm_eval.utils

    if not isinstance(lm_eval.utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(
            loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
        )
        sandbox.filters |= lm_eval.utils.env.filters
        lm_eval.utils.env = sandbox


def _files(names: Sequence[str]) -> list[Path | None]:
    """Return the file of each task; None for a group of lm-eval."""
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
    groups: set[str] = set()
    if len(own) < len(names):
        for file in Path(next(iter(lm_eval.tasks.__path__))).glob("**/*.yaml"):
            text = file.read_text(encoding="utf-8")
            files |= dict.fromkeys(TASK_NAME.findall(text), file)
            groups |= set(GROUP_NAME.findall(text))
    return [own[name] if name in own else _file_of(name, files, groups) for name in names]


def _file_of(name: str, files: Mapping[str, Path], groups: Set[str]) -> Path | None:
    if name not in files and name not in groups:
        similar = difflib.get_close_matches(name, [*files, *groups], n=3)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else "Check its spelling."
        raise ValueError(
            f"lm-eval has no task {name!r} (it has {len(files)} tasks and {len(groups)} groups; tags, which stand for "
            f"several tasks without an average, are not supported). {hint}"
        )
    return files.get(name)


def _loaded(name: str, file: Path | None, trust_task_code: bool) -> tuple[list["Task"], "Group | None"]:
    """Load a task or a group of tasks, with their data sets.

    Args:
        file: file of the task; None for a group of lm-eval.

    Raises:
        ValueError: the task cannot be loaded.
        OSError: the data cannot be loaded.
        ImportError: a package that the task needs is not installed.
    """
    from datasets.exceptions import DatasetsError

    checked = None if file is None or trust_task_code or _is_of_lm_eval(file) else read_task(file)
    try:
        found = _read(name, file, checked)
    except TemplateError as error:  # before OSError: TemplateNotFound is both
        raise ValueError(_loading_problem(name, error)) from error
    except ImportError as error:
        raise ImportError(
            f"the task {name} needs a package that cannot be imported ({error}). Install it; lm-eval's extras name the "
            "packages of its tasks, such as pip install lm_eval[ifeval]."
        ) from error
    except OSError as error:  # before DatasetsError: errors of datasets about missing data are both
        raise OSError(
            f"the data of the task {name} cannot be loaded ({error}). Connect to the Hugging Face Hub once, or set "
            "HF_DATASETS_CACHE to a folder that has the data and HF_HUB_OFFLINE=1."
        ) from error
    except (*TASK_ERRORS, DatasetsError) as error:
        raise ValueError(_loading_problem(name, error)) from error
    groups = found.get("groups") or {}
    return list(found["tasks"].values()), next(iter(groups.values()), None)


def _is_of_lm_eval(file: Path) -> bool:
    import lm_eval.tasks

    return file.resolve().is_relative_to(Path(next(iter(lm_eval.tasks.__path__))).resolve())


def _read(name: str, file: Path | None, checked: dict[str, Any] | None) -> "TaskDict":
    """Let lm-eval read a task or a group.

    Args:
        file: file of the task; None for a group of lm-eval.
        checked: content of a file that is not trusted, which is read instead of the file; None for other files.
    """
    from lm_eval.tasks import TaskManager

    if file is None:
        return TaskManager().load([name])  # the tasks of a group may be in any file
    manager = TaskManager(include_defaults=False)
    if checked is None:
        group = GROUP_NAME.search(file.read_text(encoding="utf-8"))
        if group is None or _is_of_lm_eval(file):
            return manager.load([str(file)])
        return TaskManager(include_defaults=False, include_path=str(file.parent)).load([group[1]])
    if "group" not in checked:
        return manager.load([checked])
    with TemporaryDirectory() as folder:  # lm-eval finds groups only by their names in a folder
        Path(folder, "group.yaml").write_text(json.dumps(checked), encoding="utf-8")
        return TaskManager(include_defaults=False, include_path=folder).load([checked["group"]])


def _check_output(task: "Task") -> None:
    """Refuse a task whose answers cannot be compared one by one, or that runs what a model writes.

    Raises:
        ValueError: the task is such a task.
    """
    name, kind = task.task_name, task.OUTPUT_TYPE
    if kind == GENERATED:
        _check_generation(task)
    elif kind not in SCORED or ACCURACY not in task.aggregation():
        raise ValueError(
            f"the task {name} has the output type {kind} and the metrics {', '.join(task.aggregation())}. "
            f"Only {' and '.join(SCORED)} tasks with the metric acc, and {GENERATED} tasks can be compared. Choose another "
            "task."
        )
    elif task.get_config("filter_list") is not None:
        raise ValueError(
            f"the task {name} filters the log-probabilities of its choices, which is not supported. Choose another task."
        )


def _check_generation(task: "Task") -> None:
    name, options = task.task_name, task.get_config("generation_kwargs") or {}
    if unknown := sorted(options.keys() - GENERATION):
        raise ValueError(
            f"the task {name} has {unknown[0]!r} in its generation_kwargs, which may run code. Allowed are "
            f"{', '.join(sorted(GENERATION))}."
        )
    # lm-eval ignores the temperature if do_sample is false.
    drawn = options.get("do_sample", bool(options.get("temperature")))
    if drawn or (task.get_config("repeats") or 1) > 1:
        raise ValueError(
            f"the task {name} draws its answers at random (do_sample, temperature or repeats), so that differences of two "
            "models would be differences of the draws, too. Choose a task with greedy answers, or copy its file with "
            "do_sample: false, temperature: 0.0 and repeats: 1."
        )
    if task.get_config("unsafe_code") or getattr(task, "MULTIMODAL", False):
        raise ValueError(
            f"the task {name} runs code that the model writes, or needs images or sound, which is not supported. Choose "
            "another task."
        )


def _loading_problem(name: str, error: Exception) -> str:
    if isinstance(error, TemplateError):
        return (
            f"a template of the task {name} cannot be rendered ({' '.join(str(error).split())}). Correct it: templates "
            "may use the fields of a document, filters, and methods of values, but no names that begin with an "
            "underscore."
        )
    reason = error.__cause__ or error  # the error of datasets has the reason in its cause
    return (
        f"the task {name} cannot be loaded ({reason!r}). Check that its file describes one task or one group, and that "
        "its data set matches the file."
    )


def _questions(task: "Task", documents: int | None, seed: int, shots: int) -> Questions:
    name, available = task.task_name, len(task.eval_docs)
    chosen = None if documents is None or documents >= available else _drawn(available, documents, seed)
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(FEWSHOT_SEED)
    try:
        # chosen is in rising order, because lm-eval ignores its order and uses that of the data set.
        task.build_all_requests(samples=chosen)
    except TASK_ERRORS as error:
        if shots and not isinstance(error, TemplateError):
            raise ValueError(
                f"the task {name} cannot be asked with {shots} examples ({error!r}). Check that it has as many documents "
                "to draw examples from, or use fewer."
            ) from error
        raise ValueError(_loading_problem(name, error)) from error
    asked: dict[int, list[Any]] = {}
    for instance in task.instances:
        asked.setdefault(instance.doc_id, []).append(instance)
    questions = Questions(
        task,
        document_ids=tuple(range(available) if chosen is None else chosen),
        documents=[instances[0].doc for instances in asked.values()],
        requests=[[instance.args for instance in instances] for instances in asked.values()],
        available=available,
        shots=shots,
    )
    _check_outcomes(questions)
    return questions


def _check_outcomes(questions: Questions) -> None:
    """Grade an empty answer, so that a task that cannot be graded is refused before any work."""
    try:
        found = questions.outcomes
    except TASK_ERRORS as error:
        raise ValueError(
            f"the task {questions.task} cannot grade an empty answer ({error!r}). Correct its filters and metrics."
        ) from error
    if not found:
        raise ValueError(
            f"the task {questions.task} has no metric that says whether an answer is right, such as exact_match, and whose "
            "aggregation is mean. Choose another task."
        )


def _drawn(available: int, documents: int, seed: int) -> list[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return sorted(torch.randperm(available, generator=generator)[:documents].tolist())
