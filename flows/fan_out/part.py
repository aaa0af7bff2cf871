"""Parts of a search that other processes run: the capture, the lane groups, and export and test."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from layerwise.flows.fan_out.lane_groups import lane_groups
from layerwise.flows.pipeline.lookup import FoundSearch, NextLanes, look_up
from layerwise.flows.pipeline.search_strategy import LaneRequest
from layerwise.flows.runtime import FanOutRuntime
from layerwise.flows.settings import Search
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.run_names import plans_title, windows_title


class PartFailed(Exception):
    """Another process could not run its part of a search, and repeating it would not help."""


@dataclass(frozen=True)
class Part:
    """Part of a search that another process runs as one flow run.

    Attributes:
        flow: name of its flow in ``layerwise.flows.fan_out.part_flows``.
        title: name of the part within its search.
        run_name: name of the flow run, which includes the search.
        parameters: parameters of the flow, as plain JSON.
        is_done: returns whether the store has all artifacts of the part.
    """

    flow: Literal["capture", "branch", "evaluate"]
    title: str
    run_name: str
    parameters: Mapping[str, object]
    is_done: Callable[[], bool]

    @property
    def key(self) -> str:
        """Digest of the work: the same in every process that wants this work done in this store."""
        runtime = self.parameters["runtime"]
        assert isinstance(runtime, Mapping), "a runtime is a JSON object"
        work = {name: value for name, value in self.parameters.items() if name != "runtime"}
        return digest({"flow": self.flow, "store": runtime["store"], **work})


def parameters_of(settings: Search, runtime: FanOutRuntime) -> dict[str, object]:
    """Return the parameters that all parts of a search have. A part does not fan out again."""
    return {"settings": settings.model_dump(mode="json"), "runtime": runtime.alone.model_dump(mode="json")}


@dataclass(frozen=True)
class SearchParts:
    """Divides a search into parts."""

    store: ArtifactStore
    settings: Search
    runtime: FanOutRuntime

    def capture(self) -> Part:
        """Return the part before the lanes."""
        return self._part(
            "capture", "capture", lambda: look_up(self.store, self.settings).next_lanes.are_known
        )

    def groups(self, found: FoundSearch, running: Iterable[Mapping[str, object]], workers: int) -> list[Part]:
        """Return a part for each group of the next lanes that are missing.

        Args:
            running: parameters of groups that an earlier run of this search started and that still run. These groups are
                kept as they are.
            workers: number of groups that run at a time.
        """
        lanes = found.next_lanes
        kept: list[list[int]] = []
        left = set(lanes.missing)
        for group in (_lanes_of(run, lanes.step.request) for run in running):
            if left.intersection(group) and not any(lane in other for other in kept for lane in group):
                kept.append(group)
                left -= set(group)
        sizes = found.inputs.sizes(self.settings, len(lanes.step.plans))
        to_start = replace(lanes, missing=sorted(left))
        groups = kept + lane_groups(self.store, to_start, sizes.of(lanes.step.request), self.runtime, workers)
        return [
            self._lane_group(lanes, group, f"group {number} of {len(groups)}")
            for number, group in enumerate(groups, 1)
        ]

    def export_and_test(self) -> Part:
        """Return the part after the lanes."""
        return self._part(
            "evaluate", "export and test", lambda: not look_up(self.store, self.settings).missing
        )

    def _lane_group(self, lanes: NextLanes, group: Sequence[int], which: str) -> Part:
        request = lanes.step.request
        stages = [lanes.stages[lane] for lane in group]
        plans = [request.plans[lane] for lane in group]
        parameters: dict[str, object] = {
            "points": [[plan.beta, plan.offset] for plan in plans],
            "windows": request.windows and list(request.windows),
        }
        if self.settings.makes_plans:
            parameters["layers"] = [list(plan.layers) for plan in plans]
        title = f"{plans_title(plans)}{windows_title(request.windows)}"
        part = self._part(
            "branch", title, lambda: all(self.store.find(stage) is not None for stage in stages)
        )
        return replace(part, title=f"{which}: {title}", parameters={**part.parameters, **parameters})

    def _part(
        self, flow: Literal["capture", "branch", "evaluate"], title: str, is_done: Callable[[], bool]
    ) -> Part:
        run_name = f"{self.settings.title}: {title}"
        return Part(flow, title, run_name, parameters_of(self.settings, self.runtime), is_done)


def _lanes_of(parameters: Mapping[str, object], request: LaneRequest) -> list[int]:
    """Return the requested lanes that a group scores; none if it scores them on other windows."""
    windows = cast(list[int] | None, parameters["windows"])
    if (windows and tuple(windows)) != request.windows:
        return []
    points = {tuple(point) for point in cast(list[list[float]], parameters["points"])}
    return [number for number, plan in enumerate(request.plans) if (plan.beta, plan.offset) in points]
