"""Read a file that describes a task of lm-eval, without running anything that it asks for.

lm-eval takes such a file for code: ``!function`` imports a Python module beside it, a metric that it does not know is a
script that it looks for. Files of lm-eval's own are read by lm-eval; a user's file is checked here first, with all that
it includes, and lm-eval is given what was checked.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

LONGEST = 1 << 20  # bytes of a file
MOST_VALUES = 100_000  # in a file, counting what an alias stands for as often as it is named
DEEPEST = 50  # levels of nesting
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge", "value")
}
# What a task's data set may be: formats that hold data alone. Others of the package datasets open pickles or databases.
FORMATS = ("arrow", "csv", "json", "parquet", "text")
DATASET_OPTIONS = {
    *(
        "cache_dir",
        "column_names",
        "data_dir",
        "data_files",
        "delimiter",
        "encoding",
        "field",
        "header",
        "quotechar",
    ),
    *("quoting", "revision", "sep", "skiprows", "split", "verification_mode"),
}
PROTOCOLS = ("abfs", "az", "file", "gcs", "gs", "hf", "http", "https", "s3")
# Entries of a task that name code, and what else they would be good for.
CODE = {
    "class": "a Python class",
    "custom_dataset": "a Python function",
    "unsafe_code": "running what a model writes",
    "use_prompt": "prompts from another package or file",
}
TRUST = "If you trust the file, pass --trust-task-code."


def read_task(path: Path) -> dict[str, Any]:
    """What the file describes, merged with the files that it includes.

    Raises:
        ValueError: it asks to run code, or is not one task. The message says where.
    """
    task = _merged(path, ())
    if not isinstance(task.get("task"), str) or {"group", "task_list"} & task.keys():
        raise ValueError(
            f"the task {path} cannot be loaded (it has not one name). Check that its file describes one task, not a "
            "group: a name under task, and neither group nor task_list."
        )
    for name, meaning in CODE.items():
        if task.get(name):
            raise ValueError(f"the task {path} has {name!r}, {meaning}. {TRUST}")
    _check_metrics(path, task.get("metric_list"))
    _check_data(path, task)
    return task


def _merged(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a file over that of the files that it includes, in the way of lm-eval."""
    path = path.expanduser().resolve()
    if path in including:
        raise ValueError(f"the task file {path} includes itself. Remove the include.")
    found = _content(path)
    included = found.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise ValueError(f"the task file {path} includes {name!r}, which is not the path of a file.")
        other = path.parent / name
        if not other.expanduser().is_file():
            raise ValueError(f"the task file {path} includes {name!r}, which is not a file. Check the path.")
        more = _merged(other, (*including, path))
        more.pop("task_list", None)
        merged |= more
    return merged | found


def _content(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LONGEST:
        raise ValueError(
            f"the task file {path} has more than {LONGEST} bytes. Keep the documents in a file of data."
        )
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        for line, tag in _tags(node):
            if tag not in PLAIN_TAGS:
                what = "runs Python code" if tag.startswith("!function") else "is not plain data"
                raise ValueError(f"line {line} of the task file {path} has {tag!r}, which {what}. {TRUST}")
        document = loader.construct_document(node) if node else None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the task file {path} is not YAML that can be read ({reason}). Correct it."
        ) from error
    if not isinstance(document, dict):
        raise ValueError(
            f"the task file {path} holds a {type(document).__name__}, not the entries of a task."
        )
    return document


def _tags(node: yaml.Node | None) -> Iterator[tuple[int, str]]:
    """Line and tag of every node.

    Raises:
        yaml.YAMLError: there are too many, too deep in each other, or some that contain themselves.
    """
    measured: dict[int, tuple[int, int]] = {}  # by node: values in it, levels below it

    def visit(node: yaml.Node, depth: int) -> Iterator[tuple[int, str]]:
        yield node.start_mark.line + 1, node.tag
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [each for pair in node.value for each in pair]
        size, height = 1, 0
        for child in children:
            if id(child) not in measured:
                if depth >= DEEPEST:
                    raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep, or contains itself")
                yield from visit(child, depth + 1)
            more, levels = measured[id(child)]
            size, height = size + more, max(height, levels + 1)
            if size > MOST_VALUES or depth + height > DEEPEST:
                raise yaml.YAMLError(
                    f"it has more than {MOST_VALUES} values or {DEEPEST} levels, counting those of its aliases"
                )
        measured[id(node)] = size, height

    if node is not None:
        yield from visit(node, 1)


def _check_metrics(path: Path, metrics: object) -> None:
    """Refuse metrics that lm-eval would look for as scripts, on the hub or beside the file."""
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import METRIC_REGISTRY

    if metrics is not None and not isinstance(metrics, list):
        raise ValueError(f"the task {path} has the metric_list {metrics!r}, which is not a list. Correct it.")
    for metric in metrics or []:
        name = metric.get("metric") if isinstance(metric, Mapping) else metric
        own = isinstance(metric, Mapping) and isinstance(name, str) and name in METRIC_REGISTRY
        if not own or metric.get("hf_evaluate"):
            raise ValueError(
                f"the task {path} has the metric {name!r}, which is not one of lm-eval's own: it would be looked for "
                f"as a script. Use acc and acc_norm. {TRUST}"
            )


def _check_data(path: Path, task: Mapping[str, Any]) -> None:
    """Refuse data sets that may be more than data."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    source, options = task.get("dataset_path"), task.get("dataset_kwargs") or {}
    if not isinstance(source, str) or not isinstance(options, Mapping):
        raise ValueError(
            f"the task {path} has the dataset_path {source!r} with the dataset_kwargs {options!r}. Give a name or a "
            "path, and options by name."
        )
    if source.endswith(".py") or (source in _PACKAGED_DATASETS_MODULES and source not in FORMATS):
        raise ValueError(
            f"the task {path} has the dataset_path {source!r}, which may run code. Use one of {', '.join(FORMATS)} "
            f"with data_files, a folder or a data set of the hub. {TRUST}"
        )
    unknown = [
        name
        for name, value in options.items()
        if name not in DATASET_OPTIONS and not (name == "trust_remote_code" and not value)
    ]
    if unknown:
        raise ValueError(
            f"the task {path} has {unknown[0]!r} among its dataset_kwargs, which may do more than name data. Use "
            f"{', '.join(sorted(DATASET_OPTIONS))}. {TRUST}"
        )
    for place in (source, *_strings(dict(options))):
        protocol, found, _ = place.partition("://")
        if "::" in place or (found and protocol not in PROTOCOLS):
            raise ValueError(
                f"the task {path} has data at {place!r}. Without --trust-task-code data are files, or URLs of "
                f"{', '.join(PROTOCOLS)}."
            )


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)
