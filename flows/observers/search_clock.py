"""Time that a running search still needs: from the rate of the current stage, and the estimate of ``plan`` for the others."""

import logging
import time
from collections.abc import Sequence

from layerwise.flows.pipeline.graph import LaneStep, Step
from layerwise.flows.pipeline.inputs import SearchInputs
from layerwise.flows.pipeline.lookup import FoundSearch, look_up_steps
from layerwise.flows.pipeline.search_strategy import LaneRequest, strategy_of
from layerwise.flows.pipeline.time_estimate import SearchTimes, expected_requests, measure_times
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.models.streamed import layer_sizes_of
from layerwise.tasks.running.execution import Execution, release_memory
from layerwise.tasks.running.progress import RunTime

logger = logging.getLogger(__name__)

# Floating-point operations of a search that is worth about five seconds of measuring: two minutes on a core.
LEAST_OPERATIONS = 1e13
# The export tests the model in the same pass over the weights.
BUILT_WITH = {"export": "evaluate"}
# Measured times are at most this many times as long or as short as the estimate; otherwise the estimate is of something else.
MOST_OFF = 10.0


class SearchClock:
    """Clock of one search in this process. Implements ``Observer``.

    Stages that have not begun take the time that ``plan`` estimates, times the ratio of the measured and the estimated
    time of the stages so far, including the current one.

    Args:
        found: the steps of the search, and the artifacts that the store has.
        times: rates of this machine.
    """

    def __init__(self, settings: Search, found: FoundSearch, times: SearchTimes) -> None:
        self._settings, self._inputs, self._times = settings, found.inputs, times
        # Estimated seconds of the steps that have not begun; None if unknown. Lanes are counted separately.
        self._later: dict[str, float | None] = {
            each.step.name: each.step.seconds(times)
            for each in found.steps
            if not each.is_done and not isinstance(each.step, LaneStep)
        }
        lanes = found.next_lanes
        self._lanes = self._seconds_of(lanes.step.request, len(lanes.missing)) if lanes.missing else 0.0
        self._lanes += self._after(lanes.step) if lanes.missing else 0.0
        self._measured = self._estimated = 0.0  # of the steps that have ended
        self._began = time.monotonic()
        self._current: float | None = 0.0  # estimate of the current step
        self._passes_unknown = False  # whether the current step is several passes over the layers

    def began(self, step: Step) -> None:
        self._began = time.monotonic()
        self._passes_unknown = len(step.stages) > 1 and not isinstance(step, LaneStep)
        current: float | None
        if isinstance(step, LaneStep):
            current, self._lanes = self._seconds_of(step.request, len(step.request.plans)), self._after(step)
        else:
            if step.name in ("join_rounds", "select"):
                self._lanes = 0.0
            names = [step.name, *([BUILT_WITH[step.name]] if step.name in BUILT_WITH else [])]
            parts = [self._later.pop(name) for name in names if name in self._later]
            current = None if None in parts else sum(part or 0.0 for part in parts)
        self._current = current

    def ended(self, step: Step, artifacts: Sequence[Artifact], seconds: float) -> None:
        if self._current and seconds > self._current / MOST_OFF:  # otherwise the store had its artifacts
            self._measured += seconds
            self._estimated += self._current
        self._current = 0.0

    def __call__(self, stage: float | None) -> RunTime | None:
        """Return the time that the search still needs.

        Args:
            stage: seconds left in the current stage; None before its first layer.
        """
        spent, current = time.monotonic() - self._began, self._current
        ratio = self._ratio(0.0, 0.0) if stage is None or not current else self._ratio(spent + stage, current)
        expected = 0.0 if current is None else max(current * ratio - spent, 0.0)
        left = expected if stage is None else stage
        if self._passes_unknown:
            left = max(left, expected)
        later = [*self._later.values(), self._lanes]
        left += ratio * sum(seconds or 0.0 for seconds in later)
        unknown = None in later or (stage is None and current is None)
        return RunTime(left, at_least=unknown)

    def _ratio(self, measured: float, estimated: float) -> float:
        estimated += self._estimated
        if not estimated:
            return 1.0
        return min(max((self._measured + measured) / estimated, 1 / MOST_OFF), MOST_OFF)

    def _seconds_of(self, request: LaneRequest, count: int) -> float:
        """Return the estimated time of lanes that advance as one group."""
        first, end = request.windows or (0, self._windows)
        return self._times.lanes(count, end - first, groups=1, together=1)

    def _after(self, step: LaneStep) -> float:
        """Return the estimated time of the lanes that the strategy is expected to request after ``step``."""
        strategy = strategy_of(self._settings, step.plans, self._inputs.linears, self._windows)
        end = self._windows if step.request.windows is None else step.request.windows[1]
        scored = {**step.scored, **dict.fromkeys(step.request.plans, end)}
        if self._settings.stop_after is not None and len(scored) >= self._settings.stop_after:
            return 0.0
        requests = expected_requests(strategy, scored)
        return sum(self._seconds_of(request, len(request.plans)) for request in requests)

    @property
    def _windows(self) -> int:
        return self._inputs.texts.windows["selection"]


def search_clock(
    store: ArtifactStore, settings: Search, inputs: SearchInputs, execution: Execution
) -> SearchClock | None:
    """Measure this machine for a few seconds, and return the clock of a search.

    Returns:
        None if the store has all artifacts, if the search is too small to be worth it, or if the machine cannot be
        measured.
    """
    found = look_up_steps(store, settings, inputs)
    if all(each.is_done or not each.step.work for each in found.steps) and not found.next_lanes.missing:
        return None
    sizes = inputs.sizes(settings, len(found.next_lanes.step.plans))
    windows = inputs.texts.windows
    lanes = min(settings.trials_of(sizes.plans), sizes.plans)
    forwards = windows["calibration"] + (1 + lanes) * windows["selection"] + 3 * windows["test"]
    if 2 * sum(layer_sizes_of(inputs.linears)) * settings.seqlen * forwards < LEAST_OPERATIONS:
        return None
    try:
        times = measure_times(store, sizes, inputs.checkpoint, execution)
    except Exception as error:  # the search does not depend on the measurement
        logger.warning("The time left for all stages is unknown: %s: %s", type(error).__name__, error)
        return None
    finally:
        release_memory(execution.torch_device)
    return SearchClock(settings, found, times)
