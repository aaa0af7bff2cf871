"""One piece of a search that others do, and what can be told of how it goes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import Search
from layerwise.storage.formats.canonical_json import digest


class StepFailed(Exception):
    """Another process could not do its part of a search, for a reason that will not go away by itself."""


@dataclass(frozen=True)
class Step:
    """What another process does in one flow run.

    Args:
        flow: the flow of ``layerwise.flows.fan_out.part_flows`` that does it.
        title: what it is, for people who know the search.
        run_name: the same for people who see all searches.
        parameters: of the flow, as plain JSON.
        is_done: looks whether the store has what the step makes.
    """

    flow: Literal["capture", "branch", "evaluate"]
    title: str
    run_name: str
    parameters: Mapping[str, object]
    is_done: Callable[[], bool]

    @property
    def key(self) -> str:
        """The same for whoever wants the same work to be done in the same store."""
        runtime = self.parameters["runtime"]
        assert isinstance(runtime, Mapping), "a runtime is a JSON object"
        what = {name: value for name, value in self.parameters.items() if name != "runtime"}
        return digest({"flow": self.flow, "store": runtime["store"], **what})


def parameters_of(settings: Search, runtime: Runtime) -> dict[str, object]:
    """Parameters of a step of this search: it computes alone, on whatever device it has."""
    alone = runtime.model_copy(update={"fan_out": "local", "groups": None, "minutes": None})
    return {"settings": settings.model_dump(mode="json"), "runtime": alone.model_dump(mode="json")}
