"""Executor that runs the parts of a search in processes on this machine, each with its own device."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, Pending

from layerwise.flows.fan_out import part_flows
from layerwise.flows.fan_out.liveness import has_ended
from layerwise.flows.fan_out.part import Part
from layerwise.flows.orchestration.cancellation import set_states
from layerwise.flows.orchestration.embedded_server import lifeline
from layerwise.flows.orchestration.parent_process import ENDS_WITH_PARENT
from layerwise.storage.files.credentials import without_secrets

logger = logging.getLogger(__name__)

OUTPUT_SHOWN = 2000  # last characters of the output of a dead process that an error shows


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen
    slot: int
    log: Path


class LocalProcesses:
    """Processes on this machine. Implements ``Executor``.

    Args:
        count: number of processes that run at a time.
        device: torch device. With ``auto`` or ``cuda`` each process gets its own GPU, if there are enough.
    """

    def __init__(self, client: SyncPrefectClient, count: int, device: str) -> None:
        self.workers = count
        self._client = client
        self._gpus = _gpus() if device in ("auto", "cuda") else []
        if 0 < len(self._gpus) < count:
            logger.warning(
                "%d processes share the memory of %d GPUs, and are not faster than one for each: use --fan-out processes:%d.",
                count,
                len(self._gpus),
                len(self._gpus),
            )
        self._children: dict[UUID, _Child] = {}
        self._logs = tempfile.TemporaryDirectory(prefix="layerwise-")

    def has_room(self, active: int) -> bool:
        return len(self._taken()) < self.workers  # a process ends shortly after its flow run

    def taken(self, flow: str) -> list[Mapping[str, object]]:
        return []

    def start(self, part: Part, parent: UUID, tags: Collection[str], key: str) -> FlowRun:
        # Without the key: the process ends with the search, so a later run never finds it running.
        run = self._client.create_flow_run(
            getattr(part_flows, part.flow),
            name=part.run_name,
            parameters=dict(part.parameters),
            tags=tags,
            parent_task_run_id=parent,
            state=Pending(),
        )
        slot = min(set(range(self.workers)) - self._taken())
        own = {
            # Needed for an embedded server as well; otherwise the process would start another one.
            "PREFECT_API_URL": str(self._client.api_url),
            "PREFECT__FLOW_ENTRYPOINT": f"{part_flows.__name__}:{part.flow}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONSAFEPATH": "1",  # the working folder may contain modules with the names of packages
            ENDS_WITH_PARENT: "1",
        }
        if self._gpus:
            own["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        log = Path(self._logs.name) / run.id.hex
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect.engine", str(run.id)],
                env={**os.environ, **own},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=lifeline(),
                start_new_session=True,  # Ctrl-C reaches only the search, which then stops this process at its next layer
            )
        self._children[run.id] = _Child(process, slot, log)
        return run

    def update(self, runs: Collection[FlowRun]) -> None:
        """Do nothing: the flow runs report to Prefect's server."""

    def sign_of(self, run: FlowRun) -> str | None:
        return run.id.hex

    def cause_of_death(self, run: FlowRun, pending: float) -> str | None:
        child = self._children.get(run.id)
        code = None if child is None else child.process.poll()
        if child is None or code is None:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = without_secrets(child.log.read_text(errors="replace")[-OUTPUT_SHOWN:].strip())
        return f"process {child.process.pid} {how}" + (f": {said}" if said else "")

    def kill(self, run_id: UUID) -> None:
        if child := self._children.get(run_id):
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()

    def cancel(self, runs: Collection[FlowRun]) -> None:
        self._stop()
        ours = [run for run in runs if run.id in self._children]
        set_states(self._client, ours, Cancelled(message="Its search was stopped."))

    def close(self) -> None:
        """Stop all processes at their next layer, wait for them, and give every flow run a final state."""
        self._stop()
        with suppress(httpx.HTTPError):  # a later search does not reuse these runs in any case
            for run_id in self._children:
                with suppress(ObjectNotFound):
                    run = self._client.read_flow_run(run_id)
                    if not has_ended(run):
                        set_states(self._client, [run], Crashed(message="Its search has ended."))
        self._logs.cleanup()

    def _stop(self) -> None:
        running = [child.process for child in self._children.values() if child.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()

    def _taken(self) -> set[int]:
        """Return the slots of the processes that have not ended."""
        taken = set()
        for child in self._children.values():
            if child.process.poll() is None:
                taken.add(child.slot)
            elif child.process.stdin:
                child.process.stdin.close()
        return taken


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, by their names in ``CUDA_VISIBLE_DEVICES``."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]
