"""The steps of a search as flows of their own, for other processes and machines: what each makes lies in the store."""

import logging
from collections.abc import Callable

import torch
from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Crashed, State

from layerwise.flows.orchestration.cancellation import cancelled
from layerwise.flows.orchestration.parent_process import stop_with_parent
from layerwise.flows.pipeline.damage_repair import mending
from layerwise.flows.pipeline.stages import all_scored, captured, chosen, scored
from layerwise.flows.pipeline.time_budget import refuse_minutes
from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import Search
from layerwise.storage.files.errors import Unreachable
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.signs_of_life import announced
from layerwise.tasks.results.run_names import points_title, windows_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stopping import stopping_on_sigterm

logger = logging.getLogger(__name__)


@flow(name="capture", flow_run_name="{settings.title}: capture", persist_result=False)
def capture(settings: Search, runtime: Runtime) -> State | None:
    """Import the model, sample the windows, run the dense model: all that comes before the betas."""
    return _step(settings, runtime, "capture", captured)


def _branch_name() -> str:
    parameters = flow_run.parameters
    points, windows = parameters["points"], parameters["windows"]
    what = f"{points_title(points)}{windows_title(windows)}" if points else "all plans"
    return f"{parameters['settings'].title}: {what}"


@flow(name="branch", flow_run_name=_branch_name, persist_result=False)
def branch(
    settings: Search,
    runtime: Runtime,
    points: tuple[tuple[float, float], ...] | None = None,
    windows: tuple[int, int] | None = None,
    layers: tuple[tuple[float | tuple[float, ...], ...], ...] | None = None,
) -> State | None:
    """Prune the model by these plans and score them, all in one group.

    Args:
        settings: the search that the plans belong to.
        runtime: where and how this group runs.
        points: beta and offset of some of the search's plans; empty: all that its strategy tries.
        windows: of the selection windows, these (first, and the one after the last); empty: all of them.
        layers: sparsities of every layer of the plans, or of its linears, with a strategy that makes plans itself.
    """
    if points is None:
        return _step(settings, runtime, "all plans", all_scored)
    return _step(
        settings,
        runtime,
        f"{points_title(points)}{windows_title(windows)}",
        lambda store, settings, execution: scored(store, settings, execution, points, windows, layers),
    )


@flow(name="evaluate", flow_run_name="{settings.title}: export and test", persist_result=False)
def evaluate(settings: Search, runtime: Runtime) -> State | None:
    """Choose the best beta, export the model pruned by it, and test it beside the dense and the uniform one.

    Betas that the store does not have are pruned and scored before.
    """
    return _step(settings, runtime, "export and test", chosen)


def _step(
    settings: Search,
    runtime: Runtime,
    what: str,
    work: Callable[[ArtifactStore, Search, Execution], object],
) -> State | None:
    """Do ``work`` as a part of somebody's search.

    Returns:
        A crash, for others to take up, if the storage does not answer here; a cancellation if it was one.
    """
    refuse_minutes(runtime, "a part of one")
    execution = runtime.execution()
    if warning := shared_device_warning(execution.device, torch.cuda.device_count()):
        logger.warning(warning)
    run_id = flow_run.id
    name = None if run_id is None else run_id.replace("-", "")
    try:
        with stopping_on_sigterm():
            stop_with_parent()
            store = ArtifactStore(runtime.store)
            with announced(store.fs, store.root, f"{settings.title}: {what}", name):
                mending(store, lambda: work(store, settings, execution))
    except Unreachable as error:
        return Crashed(message=str(error))
    except TerminationSignal as ending:
        return cancelled(ending)
    return None


def shared_device_warning(device: str, visible: int) -> str | None:
    """Tell that other workers of this machine would compute on the same GPU; None if each can have its own.

    Args:
        device: for torch; ``cuda`` is the first one that is visible.
        visible: number of GPUs that this process may use.
    """
    if device != "cuda" or visible < 2:
        return None
    return (
        f"this flow run sees {visible} GPUs and computes on the first one, as do all others on this machine. Start one "
        "worker for each GPU: CUDA_VISIBLE_DEVICES=0 prefect worker start ... --limit 1, and so on."
    )
