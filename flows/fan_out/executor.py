"""Interface of the executors, which run the parts of a search: local processes, a work pool, or workers of the store."""

from collections.abc import Collection, Mapping
from typing import Protocol
from uuid import UUID

from prefect.client.schemas.objects import FlowRun

from layerwise.flows.fan_out.part import Part


class Executor(Protocol):
    """Runs parts of a search: ``WorkPool``, ``LocalProcesses`` or ``StoreWorkers``."""

    @property
    def workers(self) -> int:
        """Number of parts that run at a time, as far as it is known."""
        ...

    def has_room(self, active: int) -> bool:
        """Return whether another part can be started while ``active`` parts are not finished."""
        ...

    def taken(self, flow: str) -> list[Mapping[str, object]]:
        """Return the parameters of parts that still run for an earlier run of this search, unknown to Prefect's server."""
        ...

    def start(self, part: Part, parent: UUID, tags: Collection[str], key: str) -> FlowRun:
        """Start a part.

        Args:
            parent: task run that represents the part in the run of the search.
            key: idempotency key. Two searches that start the same part with the same key get the same flow run.
        """
        ...

    def update(self, runs: Collection[FlowRun]) -> None:
        """Set the states of these runs in Prefect's server, if their processes do not report there.

        Raises:
            Unreachable: the storage does not answer.
            httpx.HTTPError: Prefect's server does not answer.
        """
        ...

    def sign_of(self, run: FlowRun) -> str | None:
        """Return the name of the sign of life of a run's process; None if no process has taken the run yet."""
        ...

    def cause_of_death(self, run: FlowRun, pending: float) -> str | None:
        """Return why the process of ``run`` must be dead; None if this executor does not know of its death.

        Args:
            pending: seconds since a worker took the run, if it has not started yet.
        """
        ...

    def kill(self, run_id: UUID) -> None:
        """Kill what is left of a run that is considered dead, if that is possible from here."""
        ...

    def cancel(self, runs: Collection[FlowRun]) -> None:
        """Stop these runs at their next layer.

        Raises:
            httpx.HTTPError: Prefect's server did not accept the cancellation of all of them.
        """
        ...

    def close(self) -> None:
        """Release the executor at the end of the search."""
        ...
