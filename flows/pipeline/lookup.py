"""Find the artifacts of a search that the store already has. Builds nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.flows.pipeline.graph import LaneStep, Step, run, search_steps
from layerwise.flows.pipeline.inputs import SearchInputs, inspect_inputs
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore


@dataclass(frozen=True)
class FoundStep:
    """A step and its artifacts; None for each missing artifact."""

    step: Step
    artifacts: tuple[Artifact | None, ...]

    @property
    def is_done(self) -> bool:
        """Whether the store has all artifacts of the step."""
        return None not in self.artifacts


@dataclass(frozen=True)
class FoundSearch:
    """Steps of a search, and the artifacts that the store has of them.

    Attributes:
        inputs: the model and the texts.
        steps: all steps that are known, in order. While lanes are missing, the strategy may request more after them.
    """

    inputs: SearchInputs
    steps: tuple[FoundStep, ...]

    @property
    def stages(self) -> dict[str, Artifact | None]:
        """Artifacts by role; None for each missing artifact."""
        return {
            role: artifact
            for found in self.steps
            for (role, _), artifact in zip(found.step.stages, found.artifacts, strict=True)
        }

    @property
    def missing(self) -> list[str]:
        """Roles of the artifacts that are missing."""
        return [role for role, artifact in self.stages.items() if artifact is None]

    @property
    def next_lanes(self) -> "NextLanes":
        """Lanes of the strategy's last request."""
        *_, last = (found for found in self.steps if isinstance(found.step, LaneStep))
        assert isinstance(last.step, LaneStep)
        missing = [number for number, artifact in enumerate(last.artifacts) if artifact is None]
        return NextLanes(last.step, missing)


@dataclass(frozen=True)
class NextLanes:
    """Lanes of a strategy's last request.

    Attributes:
        missing: positions of the lanes that the store does not have; empty if all lanes are done.
    """

    step: LaneStep
    missing: Sequence[int]

    @property
    def stages(self) -> list[Stage]:
        """Stages of the lanes; empty if they are not known yet."""
        return [stage for _, stage in self.step.stages if stage is not None]

    @property
    def are_known(self) -> bool:
        """Whether all inputs of the lanes exist."""
        return bool(self.stages)


def look_up(store: ArtifactStore, settings: Search) -> FoundSearch:
    """Find the artifacts of a search that the store has.

    Raises:
        ValueError: a search would refuse the settings.
        Damaged: an artifact that has to be read is damaged.
        OSError: the model, a text or the store cannot be reached.
    """
    return look_up_steps(store, settings, inspect_inputs(store, settings))


def look_up_steps(store: ArtifactStore, settings: Search, inputs: SearchInputs) -> FoundSearch:
    """Find the artifacts of a search that the store has.

    Raises:
        Damaged: an artifact that has to be read is damaged.
        OSError: the store cannot be reached.
    """
    steps: list[FoundStep] = []

    def answer(step: Step) -> tuple[Artifact | None, ...]:
        artifacts = tuple(None if stage is None else store.find(stage) for _, stage in step.stages)
        steps.append(FoundStep(step, artifacts))
        return artifacts

    run(search_steps(store, settings, inputs), answer)
    return FoundSearch(inputs, tuple(steps))
