"""Build a graph: call the ``build`` of every step, which reuses the artifacts that the store has."""

from layerwise.flows.pipeline.graph import Result, Step, Steps, run
from layerwise.storage.artifact import Artifact
from layerwise.tasks.running.execution import Execution


def build(steps: Steps[Result | None], execution: Execution) -> tuple[Result, dict[str, Artifact]]:
    """Build all artifacts of a graph, in order.

    Returns:
        The result of the graph, and its artifacts by role.
    """
    by_role: dict[str, Artifact] = {}

    def answer(step: Step) -> list[Artifact]:
        artifacts = list(step.build(execution))
        for (role, stage), artifact in zip(step.stages, artifacts, strict=True):
            assert stage is not None, f"{role} is built after the artifacts that it depends on"
            assert artifact.key == stage.key, f"{role}: a look-up for {stage.key} would miss {artifact.key}"
            by_role[role] = artifact
        return artifacts

    result = run(steps, answer)
    assert result is not None, "every step was built, so the result is known"
    return result, by_role
