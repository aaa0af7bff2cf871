"""Processes of this machine as the place where the steps of a search run, each with a device of its own."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, Pending

from layerwise.flows.fan_out import part_flows as steps
from layerwise.flows.fan_out.liveness import has_ended
from layerwise.flows.fan_out.step import Step
from layerwise.flows.orchestration.cancellation import set_states
from layerwise.flows.orchestration.embedded_server import lifeline
from layerwise.flows.orchestration.parent_process import ENDS_WITH_PARENT
from layerwise.storage.files.errors import without_secrets

LAST_WORDS = 2000  # characters of its output that are shown of a process that died


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen
    slot: int
    log: Path


class LocalProcesses:
    """Some processes of this machine. See ``Place`` for the methods.

    Args:
        count: how many run at a time.
        device: for torch; with ``auto`` or ``cuda`` each of them gets another GPU, as far as there are enough.
    """

    def __init__(self, client: SyncPrefectClient, count: int, device: str) -> None:
        self.workers = count
        self._client = client
        self._gpus = _gpus() if device in ("auto", "cuda") else []
        self._children: dict[UUID, _Child] = {}
        self._logs = tempfile.TemporaryDirectory(prefix="layerwise-")

    def has_room(self, active: int) -> bool:
        return len(self._taken()) < self.workers  # a process takes a moment to end after its flow run has

    def begin(self, step: Step, parent: UUID, tags: Collection[str], key: str) -> FlowRun:
        # No key: a process ends with its parent, so nobody takes it up.
        run = self._client.create_flow_run(
            getattr(steps, step.flow),
            name=step.run_name,
            parameters=dict(step.parameters),
            tags=tags,
            parent_task_run_id=parent,
            state=Pending(),
        )
        slot = min(set(range(self.workers)) - self._taken())
        own = {
            "PREFECT_API_URL": str(
                self._client.api_url
            ),  # also of an embedded server, or it would start another one
            "PREFECT__FLOW_ENTRYPOINT": f"{steps.__name__}:{step.flow}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONSAFEPATH": "1",  # the working folder may have a folder "tasks" of its own
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
                start_new_session=True,  # a Ctrl-C is for the parent, which lets it finish its layer
            )
        self._children[run.id] = _Child(process, slot, log)
        return run

    def death_of(self, run: FlowRun, pending: float) -> str | None:
        child = self._children.get(run.id)
        code = None if child is None else child.process.poll()
        if child is None or code is None:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = without_secrets(child.log.read_text(errors="replace")[-LAST_WORDS:].strip())
        return f"process {child.process.pid} {how}" + (f": {said}" if said else "")

    def end(self, run_id: UUID) -> None:
        if child := self._children.get(run_id):
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()

    def cancel(self, runs: Collection[FlowRun]) -> None:
        self._stop()
        ours = [run for run in runs if run.id in self._children]
        set_states(self._client, ours, Cancelled(message="Its search was stopped."))

    def close(self) -> None:
        """Have everything stopped at its next layer, wait for it, and leave no run that seems to go on."""
        self._stop()
        with suppress(httpx.HTTPError):  # the next search does not take them for its own in any case
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
        """Slots whose processes have not ended."""
        taken = set()
        for child in self._children.values():
            if child.process.poll() is None:
                taken.add(child.slot)
            elif child.process.stdin:
                child.process.stdin.close()
        return taken


def _gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]
