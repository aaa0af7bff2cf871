"""Where the steps of a search run, as its parent sees it."""

from collections.abc import Collection
from typing import Protocol
from uuid import UUID

from prefect.client.schemas.objects import FlowRun

from layerwise.flows.fan_out.part import Part


class Place(Protocol):
    """Where steps run: ``WorkPool`` or ``LocalProcesses``.

    Attributes:
        workers: how many run at a time, as far as it can be known.
    """

    workers: int

    def has_room(self, active: int) -> bool:
        """Whether another step can be begun while ``active`` are under way."""
        ...

    def begin(self, step: Part, parent: UUID, tags: Collection[str], key: str) -> FlowRun:
        """Begin ``step``.

        Args:
            parent: the task run that stands for it in the parent's run.
            key: two parents that begin the same step with the same key get the same flow run.
        """
        ...

    def death_of(self, run: FlowRun, pending: float) -> str | None:
        """Why the process of ``run`` must be dead, as far as this place knows.

        Args:
            pending: seconds since it was taken by a worker, if it has not begun yet.
        """
        ...

    def end(self, run_id: UUID) -> None:
        """Let nothing of a run that is taken for dead go on, where that can be done from here."""
        ...

    def cancel(self, runs: Collection[FlowRun]) -> None:
        """Have these stopped at their next layer.

        Raises:
            httpx.HTTPError: Prefect's server did not take it for all of them.
        """
        ...

    def close(self) -> None:
        """The parent ends."""
        ...
