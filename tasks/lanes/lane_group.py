"""Advance a group of lanes through the model, for ``branch``, ``evaluate`` and ``theory``."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from layerwise.calibration.capture import embed_windows
from layerwise.lanes import Lane, LaneGroup, LaneLayer
from layerwise.models.hidden_states import HiddenStatesRoom
from layerwise.pruners.layer_pruning import LayerInputs
from layerwise.scoring.local_errors import LocalErrors
from layerwise.scoring.perplexity import window_losses
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensor_into, write_tensors
from layerwise.tasks.lanes.gram_matrices import read_grams
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.lanes.statistics_table import read_statistics, statistics_identity, write_statistics
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import streamed_model
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing
from layerwise.tasks.texts.token_windows import read_input_ids

# Files of a resume point.
STATES_FILE = "hidden_states.safetensors"
OUTCOMES_FILE = "outcomes.json"


@dataclass(frozen=True)
class LaneInputs:
    """Inputs of a group of lanes, apart from the plans.

    Attributes:
        calibration: calibration windows; read only with sequential calibration.
        scored: windows that the lanes are scored on.
        grams: an artifact of ``capture_grams``, for a pruner that corrects weights.
        windows: range of the scored windows to use (start, end); None for all.
    """

    checkpoint: Checkpoint
    capture: Artifact
    calibration: Artifact
    scored: Artifact
    grams: Artifact | None = None
    windows: tuple[int, int] | None = None

    def keys(self, settings: PruneSettings) -> dict[str, str]:
        """Return the inputs by role for a stage's key: only those that the calibration mode reads."""
        common = {"checkpoint": self.checkpoint.identity, "scored": self.scored.content}
        if settings.calibration_mode == "dense":
            return common | self.calibration_keys(settings)
        return common | {"calibration": self.calibration.content}

    def calibration_keys(self, settings: PruneSettings) -> dict[str, str]:
        """Return the input statistics that the pruner reads, by role, for a stage's key."""
        if settings.needs_grams:
            assert self.grams is not None, "a search captures what its pruner needs"
            return {"grams": self.grams.content}
        return {"statistics": statistics_identity(self.capture)}

    def of_layer(self, store: ArtifactStore, layer: int, settings: PruneSettings) -> LayerInputs:
        """Read what the pruner needs to know about the inputs of one layer: statistics or Gram matrices."""
        if settings.needs_grams:
            assert self.grams is not None, "a search captures what its pruner needs"
            return read_grams(store, self.grams, layer)
        return read_statistics(store, self.capture, layer)


@dataclass(frozen=True)
class GroupResult:
    """Losses and layer outcomes of the lanes: lane 0 is the dense model, then the plans in order."""

    losses: list[list[float]]  # by lane and scored window
    outcomes: list[tuple[LaneLayer, ...]]  # by layer and lane


def advance_group(
    store: ArtifactStore,
    draft: Draft,
    inputs: LaneInputs,
    removed: Sequence[tuple[tuple[int, ...], ...]],
    settings: PruneSettings,
    execution: Execution,
    title: str,
    local_windows: int = 0,
) -> GroupResult:
    """Advance the dense model and all pruned lanes together.

    Leaves resume points in ``draft``, and resumes from the one that an earlier attempt left. With sequential
    calibration, writes every lane's own statistics into ``draft`` (``lane_folder(n)``/statistics, ``n`` from 0 in the
    order of ``removed``).

    Args:
        removed: for every lane, the number of weights to remove from each linear of each layer.
        title: title of the progress display.
        local_windows: number of scored windows on which the errors of layers are split into their parts.
    """
    read_before = inputs.checkpoint.bytes_read
    group = _Group(store, inputs, removed, settings, execution, local_windows)
    group.start(draft)
    total, lanes = group.model.num_layers, len(group.lanes)
    with boundaries(draft, execution, group.write_state) as reached:
        first = len(group.outcomes)
        with showing(title, total, first, draft.resumed) as show:
            for index, outcome in enumerate(group.layers(first), first):
                group.finish_layer(draft, index, outcome)
                show(index + 1)
                reached(index + 1)
        scored = len(group.losses)
        found = draft.resumed if scored else None
        with showing(f"{title}: losses", lanes, scored, found, unit="lane") as show:
            for lane in range(scored, lanes):
                group.score(lane)
                show(lane + 1)
                reached(total + lane + 1)
    draft.facts["weights read, bytes"] = inputs.checkpoint.bytes_read - read_before
    return GroupResult(group.losses, group.outcomes)


def lane_folder(plan: int) -> str:
    """Return the folder of one plan's files in the artifact of its group."""
    return f"lane-{plan:03d}"


class _Group:
    """A group of lanes in progress."""

    def __init__(
        self,
        store: ArtifactStore,
        inputs: LaneInputs,
        removed: Sequence[tuple[tuple[int, ...], ...]],
        settings: PruneSettings,
        execution: Execution,
        local_windows: int,
    ) -> None:
        self.store, self.inputs, self.settings = store, inputs, settings
        self.local_windows = local_windows
        start, end = inputs.windows or (0, None)
        self.scored = read_input_ids(store, inputs.scored)[start:end]
        sequential = settings.calibration_mode == "sequential"
        own = read_input_ids(store, inputs.calibration) if sequential else self.scored[:0]
        self.calibration_windows = len(own)
        self.input_ids = torch.cat([own, self.scored])
        self.model = streamed_model(inputs.checkpoint, settings.dtype, execution)
        room = HiddenStatesRoom(execution.hidden_states_bytes, execution.scratch)
        shape = (*self.input_ids.shape, inputs.checkpoint.config.get_text_config().hidden_size)
        self.lanes = [Lane(counts, room.empty(shape, self.model.dtype)) for counts in (None, *removed)]
        self.outcomes: list[tuple[LaneLayer, ...]] = []  # of finished layers
        self.losses: list[list[float]] = []  # of scored lanes

    def start(self, draft: Draft) -> None:
        """Set the hidden states to the inputs of the first unfinished layer."""
        embed_windows(self.model, self.input_ids, self.lanes[0].hidden_states, self.calibration_windows)
        if draft.resumed is None:
            for lane in self.lanes[1:]:
                lane.hidden_states.copy_(self.lanes[0].hidden_states)
            return
        state = draft.resumed.state
        for number, lane in enumerate(self.lanes):
            read_tensor_into(self.store, state, STATES_FILE, _lane_tensor(number), lane.hidden_states)
        done = json.loads(self.store.read(state, OUTCOMES_FILE))
        for row in done["outcomes"]:
            self.outcomes.append(tuple(map(_lane_layer, row)))
        self.losses += done["losses"]

    def layers(self, first: int) -> Iterator[tuple[LaneLayer, ...]]:
        inputs_of = self._captured if self.settings.calibration_mode == "dense" else None
        group = LaneGroup(
            self.model,
            self.lanes,
            self.settings.pruner,
            inputs_of,
            self.calibration_windows,
            self.settings.pattern_group,
            self.local_windows,
        )
        return group.advance(self.inputs.checkpoint.layers(first), first)

    def finish_layer(self, draft: Draft, index: int, outcome: tuple[LaneLayer, ...]) -> None:
        self.outcomes.append(outcome)
        for plan, lane in enumerate(self.lanes[1:]):
            if lane.statistics:
                write_statistics(draft, index, lane.statistics.pop(), f"{lane_folder(plan)}/statistics")

    def write_state(self, state: Draft) -> None:
        write_tensors(
            state, STATES_FILE, ((_lane_tensor(n), lane.hidden_states) for n, lane in enumerate(self.lanes))
        )
        outcomes = [[asdict(lane) for lane in outcome] for outcome in self.outcomes]
        state.write(OUTCOMES_FILE, json.dumps({"outcomes": outcomes, "losses": self.losses}).encode())

    def score(self, lane: int) -> None:
        states = self.lanes[lane].hidden_states[self.calibration_windows :]
        self.losses.append(window_losses(self.model, states, self.scored))

    def _captured(self, layer: int) -> LayerInputs:
        return self.inputs.of_layer(self.store, layer, self.settings)


def _lane_layer(row: dict[str, Any]) -> LaneLayer:
    parts = row.get("parts")
    return LaneLayer(row["error"], row["energy"], tuple(row["zeros"]), parts and LocalErrors(**parts))


def _lane_tensor(lane: int) -> str:
    return f"lane-{lane:03d}"
