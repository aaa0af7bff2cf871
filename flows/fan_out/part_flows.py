"""Flows that run one part of a search each, in another process or on another machine. Results are in the store."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Crashed, State

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.flows.orchestration.cancellation import cancelled
from layerwise.flows.orchestration.flow_frame import recorded
from layerwise.flows.orchestration.parent_process import stop_with_parent
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.flows.pipeline.graph import capture_steps, lane_step, scoring_steps, search_steps
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.pipeline.search_strategy import LaneRequest
from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import Search
from layerwise.storage.files.errors import Unreachable
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.run_names import points_title, windows_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stopping import stopping_on_sigterm

logger = logging.getLogger(__name__)

Points = tuple[tuple[float, float], ...]  # beta and offset of plans
Layers = tuple[tuple[float | tuple[float, ...], ...], ...]  # sparsities of the plans, by layer or by linear


@flow(name="capture", flow_run_name="{settings.title}: capture", persist_result=False)
def capture(settings: Search, runtime: Runtime) -> State | None:
    """Import the model, sample the windows and run the dense model: everything before the betas."""
    return _run_part(settings, runtime, "capture", _capture)


def _branch_name() -> str:
    parameters = flow_run.parameters
    points, windows = parameters["points"], parameters["windows"]
    what = f"{points_title(points)}{windows_title(windows)}" if points else "all plans"
    return f"{parameters['settings'].title}: {what}"


@flow(name="branch", flow_run_name=_branch_name, persist_result=False)
def branch(
    settings: Search,
    runtime: Runtime,
    points: Points | None = None,
    windows: tuple[int, int] | None = None,
    layers: Layers | None = None,
) -> State | None:
    """Prune the model by some plans and score them, all in one lane group.

    Args:
        settings: Search that the plans belong to.
        runtime: Where and how this group runs.
        points: Beta and offset of each plan; empty: all plans that the strategy of the search tries.
        windows: Range of the selection windows to score on (first, and one past the last); empty: all.
        layers: Sparsities of each plan, by layer or by linear, for a strategy that makes plans itself.
    """
    if points is None:
        return _run_part(settings, runtime, "all plans", _score_all)
    return _run_part(
        settings,
        runtime,
        f"{points_title(points)}{windows_title(windows)}",
        partial(_score, points=points, windows=windows, layers=layers),
    )


@flow(name="evaluate", flow_run_name="{settings.title}: export and test", persist_result=False)
def evaluate(settings: Search, runtime: Runtime) -> State | None:
    """Choose the best beta, export the model pruned by it, and test it against the dense and the uniform model.

    Betas that are missing from the store are pruned and scored first.
    """
    return _run_part(settings, runtime, "export and test", _search)


def _run_part(
    settings: Search,
    runtime: Runtime,
    title: str,
    work: Callable[[ArtifactStore, Search, Execution], object],
) -> State | None:
    """Run a part of a search that another process started.

    Returns:
        Crashed, so that the search restarts the part elsewhere, if the storage does not answer here; Cancelled if the
        run was cancelled; None otherwise.
    """
    execution = runtime.execution()
    if warning := shared_device_warning(execution.device, torch.cuda.device_count()):
        logger.warning(warning)
    run_id = flow_run.id
    name = None if run_id is None else run_id.replace("-", "")
    try:
        with stopping_on_sigterm():
            stop_with_parent()
            store = runtime.open_store()
            with recorded(store, f"{settings.title}: {title}", name):
                rebuild_damaged(store, lambda: work(store, settings, execution))
    except Unreachable as error:
        return Crashed(message=str(error))
    except TerminationSignal as ending:
        return cancelled(ending)
    return None


def _capture(store: ArtifactStore, settings: Search, execution: Execution) -> None:
    build(capture_steps(store, settings, check_inputs(store, settings)), execution)


def _score_all(store: ArtifactStore, settings: Search, execution: Execution) -> None:
    build(scoring_steps(store, settings, check_inputs(store, settings)), execution)


def _search(store: ArtifactStore, settings: Search, execution: Execution) -> None:
    build(search_steps(store, settings, check_inputs(store, settings)), execution)


def _score(
    store: ArtifactStore,
    settings: Search,
    execution: Execution,
    points: Points,
    windows: tuple[int, int] | None,
    layers: Layers | None,
) -> None:
    """Score the lanes of some plans in one group.

    Raises:
        ValueError: the search has no plan for one of ``points``.
    """
    captured, _ = build(capture_steps(store, settings, check_inputs(store, settings)), execution)
    if layers is None:
        plan_of = {(plan.beta, plan.offset): plan for plan in captured.plans}
        if unknown := sorted(set(points) - set(plan_of)):
            raise ValueError(
                f"this search has no plan for (beta, offset) {unknown}; it has {sorted(plan_of)}. "
                "Give some of these, or leave betas empty."
            )
        plans = [plan_of[point] for point in points]
    else:
        plans = [SparsityPlan(beta, each) for (beta, _), each in zip(points, layers, strict=True)]
    lane_step(store, captured, plans, LaneRequest(tuple(plans), windows)).build(execution)


def shared_device_warning(device: str, visible: int) -> str | None:
    """Return a warning if other workers on this machine would compute on the same GPU; None otherwise.

    Args:
        device: torch device; ``cuda`` is the first visible GPU.
        visible: number of GPUs that this process may use.
    """
    if device != "cuda" or visible < 2:
        return None
    return (
        f"this flow run sees {visible} GPUs and computes on the first one, like all other flow runs on this machine. "
        "Start one worker for each GPU: CUDA_VISIBLE_DEVICES=0 prefect worker start ... --limit 1, and so on."
    )
