"""Build a graph: call the ``build`` of every step, which reuses the artifacts that the store has."""

import time
from collections.abc import Sequence
from typing import Protocol

from layerwise.display.duration import duration
from layerwise.flows.pipeline.graph import Result, Step, Steps, run
from layerwise.storage.artifact import Artifact
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.log_lines import log_to_run


class Observer(Protocol):
    """Observer of the steps of a search."""

    def began(self, step: Step) -> None:
        """Note that a step begins."""

    def ended(self, step: Step, artifacts: Sequence[Artifact], seconds: float) -> None:
        """Note that a step has ended.

        Args:
            seconds: time that it took; almost none if the store had its artifacts.
        """


def build(
    steps: Steps[Result | None], execution: Execution, observers: Sequence[Observer] = ()
) -> tuple[Result, dict[str, Artifact]]:
    """Build all artifacts of a graph, in order.

    Returns:
        The result of the graph, and its artifacts by role.
    """
    by_role: dict[str, Artifact] = {}

    def answer(step: Step) -> list[Artifact]:
        for observer in observers:
            observer.began(step)
        began = time.monotonic()
        artifacts = list(step.build(execution))
        for (role, stage), artifact in zip(step.stages, artifacts, strict=True):
            assert stage is not None, f"{role} is built after the artifacts that it depends on"
            assert artifact.key == stage.key, f"{role}: a look-up for {stage.key} would miss {artifact.key}"
            by_role[role] = artifact
        seconds = time.monotonic() - began
        log_to_run(f"{step.name}: done in {duration(seconds)}", {"seconds": round(seconds, 3)})
        for observer in observers:
            observer.ended(step, artifacts, seconds)
        return artifacts

    result = run(steps, answer)
    assert result is not None, "every step was built, so the result is known"
    return result, by_role
