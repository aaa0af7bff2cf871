"""Read a YAML file with a task or a group of tasks of lm-eval without running code that the file names.

lm-eval runs code from such a file: ``!function`` imports a Python module next to it, and an unknown metric is loaded as a
script. lm-eval's own files are read by lm-eval. A user's file and all files that it includes are checked here first, and
only the checked content is passed to lm-eval.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

LONGEST = 1 << 20  # maximum size of a file in bytes
MOST_VALUES = 100_000  # maximum number of values in a file, with all aliases expanded
DEEPEST = 50  # maximum number of nested levels
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge", "value")
}
# Formats of data sets that contain only data. Other loaders of the package datasets open pickles or databases.
FORMATS = ("arrow", "csv", "json", "parquet", "text")
DATASET_OPTIONS = {
    *("cache_dir", "column_names", "data_dir", "data_files", "delimiter", "encoding", "field", "header"),
    *("quotechar", "quoting", "revision", "sep", "skiprows", "split", "verification_mode"),
}
PROTOCOLS = ("abfs", "az", "file", "gcs", "gs", "hf", "http", "https", "s3")
# Entries of a task that name code, with their meaning.
CODE = {
    "class": "a Python class",
    "custom_dataset": "a Python function",
    "unsafe_code": "running code that a model writes",
    "use_prompt": "prompts from another package or file",
}
# Entries of a group; all others are passed to its tasks.
GROUP_ENTRIES = {"aggregate_metric_list", "group", "group_alias", "metadata", "task"}
TRUST = "If you trust the file, pass --trust-task-code."


def read_task(path: Path) -> dict[str, Any]:
    """Read a file with a task or a group of tasks, merged with the files that it includes.

    Raises:
        ValueError: the file names code to run, or is neither one task nor one group; names the position.
    """
    found = _merged(path, ())
    if "group" in found and "task_list" not in found:
        _check_group(path, found, {})
    else:
        _check_task(path, found)
    return found


def _check_group(path: Path, group: Mapping[str, Any], inherited: Mapping[str, Any]) -> None:
    """Check every task of a group as a task of its own.

    Args:
        inherited: entries that the groups around this one pass to their tasks.
    """
    name, members = group["group"], group.get("task")
    if not (isinstance(name, str) and isinstance(members, list) and members) or not all(
        isinstance(member, Mapping) for member in members
    ):
        raise ValueError(
            f"the group {name!r} in {path} cannot be loaded, because it has no list of its tasks. Write a name under "
            "group, and a list under task, in which every task has all its entries. Tasks of lm-eval cannot be members: "
            "give their names to --tasks."
        )
    shared = {key: value for key, value in group.items() if key not in GROUP_ENTRIES} | dict(inherited)
    for member in members:
        if "group" in member:
            _check_group(path, member, shared)
        else:
            _check_task(path, shared | member)


def _check_task(path: Path, task: Mapping[str, Any]) -> None:
    if not isinstance(task.get("task"), str) or {"group", "task_list"} & task.keys():
        raise ValueError(
            f"the task {path} cannot be loaded, because it does not have exactly one name. Check that the file "
            "describes one task, not a group: a name under task, and neither group nor task_list."
        )
    for name, meaning in CODE.items():
        if task.get(name):
            raise ValueError(f"the task {path} has {name!r} ({meaning}), which is not allowed. {TRUST}")
    _check_metrics(path, task.get("metric_list"))
    _check_data(path, task)


def _merged(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """Return the content of a file merged over the files that it includes, as lm-eval does."""
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
            f"the task file {path} has more than {LONGEST} bytes. Put the documents into a separate data file."
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
        raise ValueError(f"the task file {path} is not valid YAML ({reason}). Correct it.") from error
    if not isinstance(document, dict):
        raise ValueError(
            f"the task file {path} holds a {type(document).__name__}, not a mapping. Write the entries of one task."
        )
    return document


def _tags(node: yaml.Node | None) -> Iterator[tuple[int, str]]:
    """Yield line and tag of every node.

    Raises:
        yaml.YAMLError: there are too many values or nested levels, or a node contains itself.
    """
    measured: dict[int, tuple[int, int]] = {}  # number of values and nested levels by node

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
                    f"it has more than {MOST_VALUES} values or {DEEPEST} levels, with aliases expanded"
                )
        measured[id(node)] = size, height

    if node is not None:
        yield from visit(node, 1)


def _check_metrics(path: Path, metrics: object) -> None:
    """Refuse metrics that lm-eval would load as scripts, from the hub or next to the file."""
    import lm_eval.api.metrics  # noqa: F401 - registers the metrics
    from lm_eval.api.registry import METRIC_REGISTRY

    if metrics is not None and not isinstance(metrics, list):
        raise ValueError(f"the task {path} has the metric_list {metrics!r}, which is not a list. Correct it.")
    for metric in metrics or []:
        name = metric.get("metric") if isinstance(metric, Mapping) else metric
        own = isinstance(metric, Mapping) and isinstance(name, str) and name in METRIC_REGISTRY
        if not own or metric.get("hf_evaluate"):
            raise ValueError(
                f"the task {path} has the metric {name!r}, which is not one of lm-eval's own and would be loaded as a "
                f"script. Use acc, acc_norm or exact_match. {TRUST}"
            )


def _check_data(path: Path, task: Mapping[str, Any]) -> None:
    """Refuse data sets that may run code."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    source, options = task.get("dataset_path"), task.get("dataset_kwargs") or {}
    if not isinstance(source, str) or not isinstance(options, Mapping):
        raise ValueError(
            f"the task {path} has the dataset_path {source!r} and the dataset_kwargs {options!r}. Give a name or path "
            "as dataset_path, and a mapping as dataset_kwargs."
        )
    if source.endswith(".py") or (source in _PACKAGED_DATASETS_MODULES and source not in FORMATS):
        raise ValueError(
            f"the task {path} has the dataset_path {source!r}, which may run code. Use one of {', '.join(FORMATS)} "
            f"with data_files, a folder, or a data set of the hub. {TRUST}"
        )
    unknown = [
        name
        for name, value in options.items()
        if name not in DATASET_OPTIONS and not (name == "trust_remote_code" and not value)
    ]
    if unknown:
        raise ValueError(
            f"the task {path} has {unknown[0]!r} in its dataset_kwargs, which may run code. Allowed are "
            f"{', '.join(sorted(DATASET_OPTIONS))}. {TRUST}"
        )
    for place in (source, *_strings(dict(options))):
        protocol, found, _ = place.partition("://")
        if "::" in place or (found and protocol not in PROTOCOLS):
            raise ValueError(
                f"the task {path} has data at {place!r}. Without --trust-task-code, data must be files or URLs of "
                f"{', '.join(PROTOCOLS)}."
            )


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(each)
