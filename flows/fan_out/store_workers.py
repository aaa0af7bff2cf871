"""Executor that publishes the parts of a search in the store, where workers (`layerwise work`) take them.

The workers report to the store and not to the search's Prefect server. This process copies their reports to its own
server, in which every part has a flow run as with other executors.
"""

import logging
import shlex
import time
from collections.abc import Collection, Mapping
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Crashed, Running, Scheduled

from layerwise.flows.fan_out import part_flows
from layerwise.flows.fan_out.part import Part
from layerwise.flows.fan_out.published_parts import (
    CLAIM,
    DESCRIPTION,
    END,
    PublishedPart,
    list_parts,
    publish_part,
    read_claim,
    read_end,
    read_part,
    remove_part,
)
from layerwise.flows.orchestration.cancellation import set_states
from layerwise.storage.signs_of_life import NEEDS_WORKERS, WORKER, living_processes
from layerwise.storage.store import ArtifactStore

logger = logging.getLogger(__name__)

PUBLISHED = 100  # maximum number of parts published at a time
ALONE = 60.0  # seconds without a worker until the user is told for the first time
TELL_AGAIN = 600.0  # seconds until the user is told again


class StoreWorkers:
    """Workers that share only the store with the search. Implements ``Executor``.

    Args:
        tag: tag of the search, the same in every run of it.
    """

    def __init__(self, client: SyncPrefectClient, store: ArtifactStore, tag: str) -> None:
        context = FlowRunContext.get()
        assert context is not None, "only a flow fans out"
        assert context.flow_run is not None, "a flow that is running has a run"
        self._client, self._store, self._tag = client, store, tag
        self._search = context.flow_run.id.hex  # also the name of its sign of life, see ``run_announced``
        self._names: dict[UUID, str] = {}  # of the published parts, by flow run
        self._signs: dict[UUID, str] = {}  # of the workers that have claimed them
        self._taken = self._sort_out_earlier_parts()
        self._alone_since: float | None = None  # on the clock ``time.monotonic``
        self._look_at = 0.0  # on the same clock: when to look for workers

    @property
    def workers(self) -> int:
        return living_workers(self._store)

    def has_room(self, active: int) -> bool:
        return active < PUBLISHED

    def taken(self, flow: str) -> list[Mapping[str, object]]:
        return [part.parameters for part in self._taken.values() if part.flow == flow]

    def start(self, part: Part, parent: UUID, tags: Collection[str], key: str) -> FlowRun:
        run = self._client.create_flow_run(
            getattr(part_flows, part.flow),
            name=part.run_name,
            parameters=dict(part.parameters),
            tags=tags,
            parent_task_run_id=parent,
            state=Scheduled(name="Open", message="No worker has taken it yet."),
        )
        name = next((name for name, taken in self._taken.items() if taken.key == part.key), None)
        if name is None:
            name = publish_part(self._store, PublishedPart.of(part, self._search, self._tag))
        else:
            del self._taken[name]
            logger.info("%s: continues in the worker that took it before", part.title)
        self._names[run.id] = name
        return run

    def update(self, runs: Collection[FlowRun]) -> None:
        files = list_parts(self._store)
        for run in runs:
            name = self._names.get(run.id)
            if name is None:
                continue
            kinds = files.get(name, set())
            if DESCRIPTION not in kinds:
                self._set_state(run, Crashed(message="its description was removed from the store"))
            elif END in kinds and (end := read_end(self._store, name)):
                self._set_state(run, State(type=end.state, message=end.message))
                self._forget(run.id)
            elif CLAIM in kinds and run.id not in self._signs and (sign := read_claim(self._store, name)):
                self._set_state(run, Running())
                self._signs[run.id] = sign
        waiting = sum(run.id in self._names and run.id not in self._signs for run in runs)
        self._tell_if_alone(waiting, claimed=len(runs) - waiting)

    def sign_of(self, run: FlowRun) -> str | None:
        return self._signs.get(run.id)

    def cause_of_death(self, run: FlowRun, pending: float) -> str | None:
        return None

    def kill(self, run_id: UUID) -> None:
        """Remove the part: if its worker was only paused, it stops at its next layer."""
        self._forget(run_id)

    def cancel(self, runs: Collection[FlowRun]) -> None:
        ours = [run for run in runs if run.id in self._names]
        for run in ours:
            self._forget(run.id)
        set_states(self._client, ours, Cancelled(message="Its search was stopped."))

    def close(self) -> None:
        """Remove the parts that no worker has taken. The others continue, and the next run of the search waits for them."""
        files = list_parts(self._store)
        for run_id, name in list(self._names.items()):
            if CLAIM not in files.get(name, set()):
                self._forget(run_id)

    def _sort_out_earlier_parts(self) -> dict[str, PublishedPart]:
        """Return the parts that workers run for an earlier run of this search. Remove those that ended or are open."""
        found = {}
        searches = {each.name for each in living_processes(self._store, NEEDS_WORKERS)} - {self._search}
        for name, kinds in list_parts(self._store).items():
            part = read_part(self._store, name)
            if part is None or part.tag != self._tag:
                continue
            if CLAIM in kinds and END not in kinds:
                found[name] = part
            elif part.search not in searches:
                remove_part(self._store, name)
        return found

    def _set_state(self, run: FlowRun, state: State) -> None:
        if run.state_type != state.type:
            set_states(self._client, [run], state)

    def _forget(self, run_id: UUID) -> None:
        name = self._names.pop(run_id, None)
        if name is not None:
            remove_part(self._store, name)

    def _tell_if_alone(self, waiting: int, claimed: int) -> None:
        """Warn from time to time while there are open parts and no worker."""
        now = time.monotonic()
        if not waiting or claimed:
            self._alone_since = None
            return
        if self._alone_since is None:
            self._alone_since, self._look_at = now, now + ALONE
        if now < self._look_at:
            return
        self._look_at = now + ALONE
        if not living_processes(self._store, WORKER):
            self._look_at = now + TELL_AGAIN
            logger.warning(
                "%s has had no worker for %.0f s. Open parts of the search: %d; the search waits. Start workers on machines "
                "that reach the store: layerwise work %s",
                self._store.url,
                now - self._alone_since,
                waiting,
                shlex.quote(self._store.url),
            )


def living_workers(store: ArtifactStore) -> int:
    """Return the number of workers in a store; 1 if there are none yet."""
    return max(len(living_processes(store, WORKER)), 1)
