"""Several searches that differ in their allocation only, advanced together: their lanes share groups and tests.

A lane's artifact is the same in whatever group it ran, so that each search then finds all that it needs.
"""

from collections.abc import Sequence

from layerwise.allocators.allocation import SparsityPlan
from layerwise.flows.pipeline.lookup import Found, look_up
from layerwise.flows.pipeline.stages import Captured, all_scored, captured
from layerwise.flows.settings import Search
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.allocate import MOST_PLANS
from layerwise.tasks.branch import branch
from layerwise.tasks.evaluate import evaluate_together
from layerwise.tasks.results.selection import DENSE_PERPLEXITY
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.select import compare


def advance_together(store: ArtifactStore, searches: Sequence[Search], execution: Execution) -> None:
    """Score what the searches ask for, request by request, and test what they choose.

    Every request of all searches is one read of the model, one pass of the dense model, and one set of factors for a
    pruner that corrects weights.

    Args:
        searches: they differ in nothing that a lane depends on, but for its plan.
    """
    before = [captured(store, search, execution) for search in searches]
    while requests := _missing([look_up(store, search) for search in searches]):
        windows, plans = next(iter(requests.items()))
        inputs = before[0].inputs("selection", windows)
        branch(store, inputs, plans, before[0].linears, before[0].pruning, execution)
    ends = [_chosen(store, search, execution) for search in searches]
    first, uniform, _ = ends[0]
    bests = [best for _, _, best in ends]
    evaluate_together(store, first.inputs("test"), uniform, bests, first.linears, first.pruning, execution)


def _missing(found: Sequence[Found]) -> dict[tuple[int, int] | None, list[SparsityPlan]]:
    """Plans of the lanes that are to be scored next and that the store lacks, by the windows they are scored on."""
    plans: dict[tuple[int, int] | None, dict[str, SparsityPlan]] = {}
    for each in found:
        if each.request is None:
            continue
        for number in each.missing_lanes:
            of_windows = plans.setdefault(each.request.windows, {})
            of_windows.setdefault(each.lanes[number].key, each.request.plans[number])
    return {windows: [*by_key.values()][:MOST_PLANS] for windows, by_key in plans.items()}


def _chosen(
    store: ArtifactStore, search: Search, execution: Execution
) -> tuple[Captured, SparsityPlan, SparsityPlan]:
    """What a search has captured, its uniform plan, and its best one."""
    before, scores = all_scored(store, search, execution)
    dense = float(str(before.capture.facts[DENSE_PERPLEXITY]))
    return before, scores[0].plan, scores[compare(scores, dense).best].plan
