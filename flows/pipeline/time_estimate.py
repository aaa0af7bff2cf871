"""Estimate of the time of a search's stages, from rates measured on this machine."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.compute_rates import ComputeRates, measure_compute
from layerwise.flows.pipeline.search_strategy import LaneRequest, SearchStrategy
from layerwise.flows.pipeline.size_estimate import SearchSizes
from layerwise.flows.settings import PLAN_MAKERS
from layerwise.recovery.pruned_layer import held_out_windows
from layerwise.recovery.train import Train
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.evaluate import LOCAL_WINDOWS
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import layer_sizes_of, model_of_shapes
from layerwise.tasks.models.transfer_rates import TransferRates, measure_transfers
from layerwise.tasks.running.execution import Execution

# A refitted lane in plain lanes of as many windows, with its calibration windows, those of the dense model, and the windows
# that it is scored on (docs/figures.md#recovery).
REFITTED_LANES = 5.8
# Passes of a window and an epoch of training: the target, forward, backward (two), and the steps of Adam.
TRAINING_PASSES = 5
MOST_MEASURED_LANES = 8  # masks of more lanes take a little longer to rank
# A search whose lanes are not known yet is assumed to find a curve like those of the papers: its minimum is at this share of
# the largest beta, and uniform is half a nat above it. The losses of two plans differ by .04 nats from window to window.
BEST_SHARE, HEIGHT, DEVIATION = 0.4, 3.0, 0.04


@dataclass(frozen=True)
class SearchTimes:
    """Seconds of the stages of a search.

    Reading of the next layer overlaps with the computation of a layer; everything else follows one after the other.
    Resume points, the start of Prefect, and tokenizing are not counted.
    """

    sizes: SearchSizes
    compute: ComputeRates
    transfer: TransferRates

    @property
    def importing(self) -> float | None:
        """Import of the model; None if it is downloaded or converted."""
        rate = self.transfer.imported
        return None if rate is None else self.sizes.files / rate

    @property
    def capture(self) -> float:
        """Pass of the dense model over the calibration and the selection windows."""
        calibration, selection = (self.sizes.windows[role] for role in ("calibration", "selection"))
        layer = (calibration + selection) * self.compute.layer + calibration * self.compute.statistics
        return self._pass(layer) + selection * self.compute.head + self.written(self.sizes.capture)

    @property
    def grams(self) -> float:
        """Pass of the dense model for the second moments."""
        layer = self.sizes.windows["calibration"] * (self.compute.layer + self.compute.grams)
        return self._pass(layer) + self.written(self.sizes.grams)

    @property
    def dense_states(self) -> float:
        """Pass of the dense model over the selection windows."""
        layers = self._pass(self.sizes.windows["selection"] * self.compute.layer)
        return layers + self.written(self.sizes.dense_states)

    @property
    def export(self) -> float:
        """Pruning and writing of the best model."""
        layer = self.compute.preparing + self.compute.pruning
        written = self.written(self.sizes.weights)
        copied = self.sizes.files - self.sizes.weights  # e.g. image encoders
        rest = self._read(copied) + self.written(copied)
        return self._pass(layer + self._grams_of_a_layer + written / self._layers) + rest

    @property
    def evaluation(self) -> float:
        """Test of the dense, the uniform and the best model; with recovery, also of the two models before it."""
        recover, windows = self.sizes.settings.recover, self.sizes.windows["test"]
        pruned = 2 if recover is None else 4
        if recover is not None:
            windows += held_out_windows(recover, self.sizes.windows["calibration"])
        local = min(LOCAL_WINDOWS, self.sizes.windows["test"])
        lane = (windows + local) * self.compute.layer + self.compute.pruning
        layer = windows * self.compute.layer + self._shared + pruned * lane
        if self.sizes.settings.calibration_mode == "sequential":
            layer += pruned * self._own_calibration
        return self._pass(layer) + windows * (pruned * self._head + self.compute.head)

    def recovery(self, plans: int) -> float:
        """Return the seconds of the recovery of chosen plans on all calibration windows."""
        settings, windows = self.sizes.settings.recover, self.sizes.windows["calibration"]
        passes = (REFITTED_LANES - 1) * windows
        if isinstance(settings, Train):
            fitted = windows - held_out_windows(settings, windows)
            passes += settings.epochs * TRAINING_PASSES * fitted
        layer = passes * self.compute.layer + self._shared + self.compute.pruning
        return plans * (self._pass(layer) + self.written(sum(self.sizes.index.layer_bytes)))

    def lanes(self, count: int, windows: int, groups: int, together: int) -> float:
        """Return the seconds of one request for lanes.

        Args:
            count: number of lanes.
            windows: number of windows that they are scored on.
            groups: number of groups that they are divided into.
            together: number of groups that run at the same time.
        """
        in_group = ceil(count / groups)
        lane = windows * self.compute.layer + self.compute.pruning
        if self.sizes.settings.recover is not None:
            lane += (REFITTED_LANES - 1) * self.sizes.own_windows * self.compute.layer
        elif self.sizes.settings.calibration_mode == "sequential":
            lane += self._own_calibration
        group = self._pass(self._shared + in_group * lane) + in_group * windows * self._head
        return ceil(groups / together) * group + self.written(self.sizes.lanes_files(count))

    @property
    def _head(self) -> float:
        """Head of one window of a pruned model; for its divergence, also that of the dense model."""
        return self.compute.head * (2 if self.sizes.settings.criterion == "kl" else 1)

    @property
    def _own_calibration(self) -> float:
        """Layer of a lane that calibrates itself: its windows pass the dense and the pruned layer; it ranks alone."""
        windows = self.sizes.own_windows
        return windows * (2 * self.compute.layer + self.compute.statistics) + self.compute.preparing

    @property
    def _shared(self) -> float:
        """Layer of a group, apart from its lanes."""
        if self.sizes.settings.calibration_mode == "sequential":
            return 0.0
        return self.compute.preparing + self._grams_of_a_layer

    @property
    def _grams_of_a_layer(self) -> float:
        if not self.sizes.settings.pruning("auto").needs_grams:
            return 0.0
        return self._read(self.sizes.grams / self._layers)

    @property
    def _layers(self) -> float:
        """Number of layers of the size of the largest one, which was measured."""
        weights = layer_sizes_of(self.sizes.linears)
        return sum(weights) / max(weights)

    def _pass(self, layer: float) -> float:
        """Return the seconds of a pass over the model, with ``layer`` seconds of computation in every layer."""
        read = self._read(sum(self.sizes.index.layer_bytes)) / self._layers
        layers = self._layers * max(read, layer + self.compute.load)
        return self._read(self.sizes.index.outer_bytes) + read + layers

    def _read(self, nbytes: float) -> float:
        return 0.0 if self.transfer.read is None else nbytes / self.transfer.read

    def written(self, nbytes: float) -> float:
        return 0.0 if self.transfer.written is None else nbytes / self.transfer.written


def measure_times(
    store: ArtifactStore, sizes: SearchSizes, checkpoint: Checkpoint | None, execution: Execution
) -> SearchTimes:
    """Measure this machine for a few seconds. Writes nothing that stays.

    Args:
        checkpoint: the imported model; None if it is not imported yet.

    Raises:
        ValueError: the model cannot be streamed.
    """
    settings = sizes.settings
    transfer = measure_transfers(store, settings.model, checkpoint, sizes.index)
    weights = layer_sizes_of(sizes.linears)
    largest = weights.index(max(weights))
    model, layer = model_of_shapes(sizes.index, largest, sizes.dtype, execution.torch_device)
    pruning, lanes = settings.pruning(sizes.dtype), min(sizes.plans, MOST_MEASURED_LANES)
    sparsities = [settings.sparsity * (1 - 0.1 * lane / lanes) for lane in reversed(range(lanes))]
    compute = measure_compute(
        model, largest, layer, settings.seqlen, settings.pruner, sparsities, pruning.pattern_group
    )
    return SearchTimes(sizes, compute, transfer)


def expected_requests(strategy: SearchStrategy, scored: Mapping[SparsityPlan, int]) -> list[LaneRequest]:
    """Return the requests that a strategy still makes if the losses are those of a typical curve.

    A strategy that makes its own plans is assumed to try as many as it may, and as many together as it ever does.

    Args:
        scored: number of selection windows that a plan was scored on, for every plan tried so far.
    """
    uniform, trials = strategy.plans[0], strategy.trials
    if strategy.name in PLAN_MAKERS:
        most = strategy.largest_request
        return [
            LaneRequest((uniform,) * min(most, trials - first)) for first in range(len(scored), trials, most)
        ]
    requests: list[LaneRequest] = []
    known = {plan: _typical_losses(strategy, plan, windows) for plan, windows in scored.items()}
    while request := strategy.next_lanes(known):
        requests.append(request)
        end = strategy.windows if request.windows is None else request.windows[1]
        known |= {plan: _typical_losses(strategy, plan, end) for plan in request.plans}
    return requests


def _typical_losses(strategy: SearchStrategy, plan: SparsityPlan, windows: int) -> list[float]:
    """Return losses in nats; their level does not matter."""
    largest = max(other.beta for other in strategy.plans) or 1.0
    loss = HEIGHT * (plan.beta / largest - BEST_SHARE) ** 2 + plan.offset**2
    noise = random.Random(strategy.plans.index(plan))
    return [loss + noise.gauss(0, DEVIATION) for _ in range(windows)]
