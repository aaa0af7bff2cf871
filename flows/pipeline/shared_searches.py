"""Searches that differ in their allocation only, advanced together: they share groups of lanes and the test.

A lane's artifact does not depend on the group that it ran in, so each search then finds everything that it needs.
"""

from collections.abc import Sequence

from layerwise.allocators.allocation import SparsityPlan
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.graph import Scored, capture_steps, lane_step, scoring_steps
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.pipeline.lane_requests import LaneRequest
from layerwise.flows.pipeline.lookup import NextLanes, look_up
from layerwise.flows.settings import Search
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.allocate import MOST_PLANS
from layerwise.tasks.lanes.evaluate_group import evaluate_together
from layerwise.tasks.running.execution import Execution


def advance_together(store: ArtifactStore, searches: Sequence[Search], execution: Execution) -> None:
    """Score the plans that the searches ask for, and test those that they choose.

    The requests of all searches share one read of the model, one pass of the dense model, and one set of factors for a
    pruner that corrects weights.

    Args:
        searches: searches in which a lane depends on the same settings, except for its plan.
    """
    captured = [
        build(capture_steps(store, search, check_inputs(store, search)), execution)[0] for search in searches
    ]
    while requests := _missing([look_up(store, search).next_lanes for search in searches]):
        lane_step(store, captured[0], captured[0].plans, requests[0]).build(execution)
    scored = [_score(store, search, execution) for search in searches]
    before, uniform = scored[0].captured, scored[0].uniform.plan
    best = [each.best.plan for each in scored]
    evaluate_together(store, before.inputs("test"), uniform, best, before.linears, before.pruning, execution)


def _missing(lanes: Sequence[NextLanes]) -> list[LaneRequest]:
    """Return requests for the lanes that the store lacks, one for each range of windows."""
    plans: dict[tuple[int, int] | None, dict[str, SparsityPlan]] = {}
    for each in lanes:
        for number in each.missing:
            of_windows = plans.setdefault(each.step.request.windows, {})
            of_windows.setdefault(each.stages[number].key, each.step.request.plans[number])
    return [LaneRequest(tuple(by_key.values())[:MOST_PLANS], windows) for windows, by_key in plans.items()]


def _score(store: ArtifactStore, search: Search, execution: Execution) -> Scored:
    scored, _ = build(scoring_steps(store, search, check_inputs(store, search)), execution)
    return scored
