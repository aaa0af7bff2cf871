"""Groups of tasks of lm-eval, such as MMLU, and how their tasks are averaged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig


@dataclass(frozen=True)
class TaskGroup:
    """A group whose tasks are averaged.

    Attributes:
        tasks: names of all its tasks, also of those in groups inside of it.
        weight_by_size: whether a task weighs as much as it has documents; otherwise all tasks weigh the same.
        inside: name of the group that this one belongs to; empty for a group that was asked for.
    """

    name: str
    tasks: tuple[str, ...]
    weight_by_size: bool
    inside: str = ""


def averaged_groups(asked: "Group", metrics: Mapping[str, str]) -> list[TaskGroup]:
    """Return a group and the groups inside of it, without those whose tasks lm-eval does not average.

    Args:
        asked: the group that was asked for.
        metrics: metric that is compared, with its filter, by task.
    """
    found = []
    for group in (asked, *asked.get_all_groups()):
        tasks = tuple(task.task_name for task in group.get_all_tasks())
        for rule in group.aggregate_metric_list or ():
            if tasks and all(_averages(rule, metrics[task]) for task in tasks):
                inside = "" if group is asked else asked.name
                found.append(TaskGroup(group.name, tasks, rule.weight_by_size, inside))
                break
    return found


def _averages(rule: "AggMetricConfig", metric: str) -> bool:
    """Return whether a rule of a group averages this metric."""
    name, _, of_filter = metric.partition(",")
    return name == rule.metric and (rule.filter_list is None or (of_filter or "none") in rule.filter_list)
