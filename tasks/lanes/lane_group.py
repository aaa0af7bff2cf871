"""Advance a group of lanes through the model, for ``branch``, ``evaluate`` and ``theory``."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from layerwise.calibration.capture import embed_windows
from layerwise.lanes import Lane, LaneGroup, LaneLayer
from layerwise.pruners.layer_pruning import LayerInputs
from layerwise.recovery.layer_recovery import RecoveryOutcome
from layerwise.scoring.criterion import Criterion
from layerwise.scoring.divergence import losses_and_divergences
from layerwise.scoring.local_errors import LocalErrors
from layerwise.scoring.perplexity import loss_of_tokens, window_losses
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensor_into, write_tensors
from layerwise.tasks.lanes.dense_states import read_dense_states
from layerwise.tasks.lanes.gram_matrices import read_grams
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.lanes.statistics_table import read_statistics, statistics_identity, write_statistics
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import streamed_model
from layerwise.tasks.running.execution import Execution, return_freed_memory
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing
from layerwise.tasks.texts.token_windows import read_counted, read_input_ids, read_responses

# Files of a resume point.
STATES_FILE = "hidden_states.safetensors"
OUTCOMES_FILE = "outcomes.json"

LayerWatch = Callable[
    [int, Mapping[str, Tensor]], None
]  # gets a layer and its weights by name, and does not change them


@dataclass(frozen=True)
class LaneInputs:
    """Inputs of a group of lanes, apart from the plans.

    Attributes:
        calibration: calibration windows; read only with sequential calibration, recovery or ``held_out``.
        scored: windows that the lanes are scored on.
        grams: an artifact of ``capture_grams``, for a pruner that corrects weights.
        windows: range of the scored windows to use (start, end); None for all.
        recovery_windows: number of calibration windows for the recovery, the first ones; None for all.
        held_out: number of calibration windows, the last ones, that lanes without recovery are scored on too.
        criterion: what the plans are compared by. With ``kl``, the divergence from the dense model is measured too.
        dense_states: artifact of ``capture_dense_states`` for the criterion ``kl``; None if the dense model runs on the scored
            windows as a lane of the group.
    """

    checkpoint: Checkpoint
    capture: Artifact
    calibration: Artifact
    scored: Artifact
    grams: Artifact | None = None
    windows: tuple[int, int] | None = None
    recovery_windows: int | None = None
    held_out: int = 0
    criterion: Criterion = "perplexity"
    dense_states: Artifact | None = None

    def keys(self, settings: PruneSettings) -> dict[str, str]:
        """Return the inputs by role for a stage's key: only those that the calibration mode reads."""
        scored = {"scored": self.scored.content}
        if self.held_out:
            scored["held out"] = self.calibration.content
        if self.dense_states is not None:
            scored["dense states"] = self.dense_states.content
        if settings.calibration_mode == "sequential":
            both = {"checkpoint": self.checkpoint.identity, "calibration": self.calibration.content}
            return both | scored
        return self.calibration_keys(settings) | scored

    def calibration_keys(self, settings: PruneSettings) -> dict[str, str]:
        """Return the inputs that pruned weights depend on, by role, unless a lane calibrates itself."""
        recovery = {} if settings.recover is None else {"calibration": self.calibration.content}
        return {"checkpoint": self.checkpoint.identity, **self.statistics_keys(settings), **recovery}

    def statistics_keys(self, settings: PruneSettings) -> dict[str, str]:
        """Return the input statistics that the pruner reads, by role, for a stage's key."""
        if settings.needs_grams:
            assert self.grams is not None, "a search captures what its pruner needs"
            return {"grams": self.grams.content}
        return {"statistics": statistics_identity(self.capture)}

    @property
    def only_calibration(self) -> "LaneInputs":
        """These inputs without scored windows, with all calibration windows for the recovery."""
        return replace(
            self, windows=(0, 0), recovery_windows=None, held_out=0, criterion="perplexity", dense_states=None
        )

    def of_layer(self, store: ArtifactStore, layer: int, settings: PruneSettings) -> LayerInputs:
        """Read what the pruner needs to know about the inputs of one layer: statistics or Gram matrices."""
        if settings.needs_grams:
            assert self.grams is not None, "a search captures what its pruner needs"
            return read_grams(store, self.grams, layer)
        return read_statistics(store, self.capture, layer)


@dataclass(frozen=True)
class PlannedLane:
    """A pruned lane that a group advances.

    Attributes:
        removed: number of weights to remove from each linear of each layer.
        recovered: weights of a layer that were recovered before; see ``Lane.recovered_weights``.
        keep: keeps what the group recovers: layer, weights by linear, outcome; None if only the scores are wanted.
    """

    removed: tuple[tuple[int, ...], ...]
    recovered: Callable[[int], Mapping[str, Tensor] | None] = lambda layer: None
    keep: Callable[[int, Mapping[str, Tensor], RecoveryOutcome | None], None] | None = None


@dataclass(frozen=True)
class GroupResult:
    """Losses and layer outcomes of the lanes: lane 0 is the dense model, then the plans in order.

    Attributes:
        losses: by lane and scored window, in nats; none of the dense model if no errors were measured.
        outcomes: by layer and lane.
        held_out: losses by lane and held-out calibration window; empty lists if there are none.
        divergences: divergences from the dense model by lane and scored window, in nats; empty lists for the dense model,
            and if the criterion is not ``kl``.
        response_losses: mean loss of the tokens of responses in the scored windows by lane; None for plain text, and if no
            errors were measured.
    """

    losses: list[list[float]]
    outcomes: list[tuple[LaneLayer, ...]]
    held_out: list[list[float]]
    divergences: list[list[float]]
    response_losses: list[float | None]

    def of(self, lanes: Sequence[int]) -> "GroupResult":
        """Return the results of some lanes."""
        return GroupResult(
            [self.losses[lane] for lane in lanes],
            [tuple(outcome[lane] for lane in lanes) for outcome in self.outcomes],
            [self.held_out[lane] for lane in lanes],
            [self.divergences[lane] for lane in lanes],
            [self.response_losses[lane] for lane in lanes],
        )


def advance_group(
    store: ArtifactStore,
    draft: Draft,
    inputs: LaneInputs,
    planned: Sequence[PlannedLane],
    settings: PruneSettings,
    execution: Execution,
    title: str,
    local_windows: int | None = None,
    watch: LayerWatch | None = None,
) -> GroupResult:
    """Advance all pruned lanes together, and the dense model as far as it is needed.

    Leaves resume points in ``draft``, and resumes from the one that an earlier attempt left. With sequential
    calibration, writes every lane's own statistics into ``draft`` (``lane_folder(n)``/statistics, ``n`` from 0 in the
    order of ``planned``).

    Args:
        planned: the pruned lanes.
        title: title of the progress display.
        local_windows: number of scored windows on which the errors of layers are split into their parts. None: no
            errors are measured, so the dense model does not run on the scored windows.
        watch: is called with every layer before the lanes prune it, so that another stage shares the pass over the weights.
    """
    read_before = inputs.checkpoint.bytes_read
    group = _Group(store, inputs, planned, settings, execution, local_windows, watch)
    group.start(draft)
    total, lanes = group.model.num_layers, len(group.lanes)
    with boundaries(draft, execution, group.write_state) as reached:
        first = len(group.outcomes)
        with showing(title, total, first, draft.resumed) as show:
            for index, outcome in enumerate(group.layers(first), first):
                group.finish_layer(draft, index, outcome)
                show(index + 1)
                reached(index + 1)
        if len(group.scored):
            scored = len(group.losses)
            found = draft.resumed if scored else None
            with showing(f"{title}: losses", lanes, scored, found, unit="lane") as show:
                for lane in range(scored, lanes):
                    group.score(lane)
                    show(lane + 1)
                    reached(total + lane + 1)
    draft.facts["weights read, bytes"] = inputs.checkpoint.bytes_read - read_before
    return GroupResult(
        group.losses, group.outcomes, group.held_out_losses, group.divergences, group.response_losses
    )


def lane_folder(plan: int) -> str:
    """Return the folder of one plan's files in the artifact of its group."""
    return f"lane-{plan:03d}"


class _Group:
    """A group of lanes in progress."""

    def __init__(
        self,
        store: ArtifactStore,
        inputs: LaneInputs,
        planned: Sequence[PlannedLane],
        settings: PruneSettings,
        execution: Execution,
        local_windows: int | None,
        watch: LayerWatch | None,
    ) -> None:
        self.watch = watch
        self.store, self.inputs, self.settings = store, inputs, settings
        self.local_windows = local_windows or 0
        start, end = inputs.windows or (0, None)
        self.scored = read_input_ids(store, inputs.scored)[start:end]
        own, self.counted = self._own_windows()
        self.calibration_windows = len(own)
        self.input_ids = torch.cat([own, self.scored])
        self.model = streamed_model(inputs.checkpoint, settings.dtype, execution)
        self.room = room = execution.hidden_states_room()
        shape = (*self.input_ids.shape, self.model.layout.size)
        self.planned = planned
        dense_windows = len(self.input_ids)
        if local_windows is None:
            dense_windows = self.calibration_windows if settings.recover is not None else 0
        self.lanes = [Lane(None, room.empty((dense_windows, *shape[1:]), self.model.dtype))]
        for each in planned:
            states = room.empty(shape, self.model.dtype)
            kept: list[Mapping[str, Tensor]] | None = None if each.keep is None else []
            self.lanes.append(Lane(each.removed, states, recovered_weights=each.recovered, recovered=kept))
        self.rooms: tuple[Tensor, Tensor] | None = None
        if settings.recover is not None:
            own_shape = (self.calibration_windows, *shape[1:])
            self.rooms = room.empty(own_shape, self.model.dtype), room.empty(own_shape, self.model.dtype)
        self.outcomes: list[tuple[LaneLayer, ...]] = []  # of finished layers
        self.losses: list[list[float]] = []  # of scored lanes
        self.held_out_losses: list[list[float]] = []  # of scored lanes
        self.divergences: list[list[float]] = []  # of scored lanes
        self.response_losses: list[float | None] = []  # of scored lanes
        self.responses = None
        if local_windows is not None:
            self.responses = read_responses(store, inputs.scored)

    def _own_windows(self) -> tuple[Tensor, Tensor | None]:
        """Return the calibration windows that every lane carries, shape ``(windows, seqlen)``, and their mask.

        The mask is that of ``read_counted``: None if all tokens count.
        """
        plain = self.settings.calibration_mode == "dense" and self.settings.recover is None
        if plain and not self.inputs.held_out:
            return self.scored[:0], None
        windows = read_input_ids(self.store, self.inputs.calibration)
        if self.settings.calibration_mode == "sequential":
            own = slice(None)
        elif self.settings.recover is not None:
            own = slice(self.inputs.recovery_windows)
        else:
            own = slice(len(windows) - self.inputs.held_out, None)
        counted = read_counted(self.store, self.inputs.calibration, self.settings.calibrate_on)
        return windows[own], None if counted is None else counted[own]

    def start(self, draft: Draft) -> None:
        """Set the hidden states to the inputs of the first unfinished layer."""
        first = self.lanes[1].hidden_states
        embed_windows(self.model, self.input_ids, first, self.calibration_windows)
        if draft.resumed is None:
            for lane in self.lanes:
                lane.hidden_states.copy_(first[: len(lane.hidden_states)])
            return
        state = draft.resumed.state
        for number, lane in enumerate(self.lanes):
            read_tensor_into(self.store, state, STATES_FILE, _lane_tensor(number), lane.hidden_states)
        done = json.loads(self.store.read(state, OUTCOMES_FILE))
        for row in done["outcomes"]:
            self.outcomes.append(tuple(map(_lane_layer, row)))
        self.losses += done["losses"]
        # Resume points of older versions have no held-out windows.
        self.held_out_losses += done.get("held_out", [[] for _ in done["losses"]])
        self.divergences += done.get("divergences", [[] for _ in done["losses"]])
        self.response_losses += done.get("responses", [None for _ in done["losses"]])

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
            self.settings.recover,
            self.rooms,
            self.counted,
        )
        return group.advance(self._watched_layers(first), first)

    def _watched_layers(self, first: int) -> Iterator[dict[str, Tensor]]:
        with closing(self.inputs.checkpoint.layers(first, self.model.device)) as layers:
            for index, weights in enumerate(layers, first):
                if self.watch is not None:
                    self.watch(index, weights)
                yield weights

    def finish_layer(self, draft: Draft, index: int, outcome: tuple[LaneLayer, ...]) -> None:
        self.outcomes.append(outcome)
        for plan, lane in enumerate(self.lanes[1:]):
            if lane.statistics:
                write_statistics(draft, index, lane.statistics.pop(), f"{lane_folder(plan)}/statistics")
            if lane.recovered and (keep := self.planned[plan].keep) is not None:
                keep(index, lane.recovered.pop(), outcome[plan + 1].recovery)
        if self.settings.recover is not None:
            return_freed_memory()

    def write_state(self, state: Draft) -> None:
        write_tensors(
            state, STATES_FILE, ((_lane_tensor(n), lane.hidden_states) for n, lane in enumerate(self.lanes))
        )
        outcomes = [[asdict(lane) for lane in outcome] for outcome in self.outcomes]
        losses = {
            "losses": self.losses,
            "held_out": self.held_out_losses,
            "divergences": self.divergences,
            "responses": self.response_losses,
        }
        state.write(OUTCOMES_FILE, json.dumps({"outcomes": outcomes, **losses}).encode())

    def score(self, lane: int) -> None:
        states = self.lanes[lane].hidden_states
        own = self.calibration_windows
        if len(states) < len(self.input_ids):  # the dense model, which was not scored
            self.losses.append([])
            self.held_out_losses.append([])
            self.divergences.append([])
            self.response_losses.append(None)
            return
        held_out = slice(own - self.inputs.held_out, own)
        counted = None if self.counted is None else self.counted[held_out]
        losses = window_losses(self.model, states[held_out], self.input_ids[held_out], counted)
        self.held_out_losses.append(losses)
        if self.inputs.criterion == "kl" and lane:
            scored = self.model, states[own:], self.dense_scored, self.scored
            losses, divergences = losses_and_divergences(*scored)
        else:
            losses, divergences = window_losses(self.model, states[own:], self.scored), []
        self.losses.append(losses)
        self.divergences.append(divergences)
        of_responses = None
        if self.responses is not None:
            of_responses = loss_of_tokens(self.model, states[own:], self.scored, self.responses)
        self.response_losses.append(of_responses)

    @cached_property
    def dense_scored(self) -> Tensor:
        """Output of the dense model's last layer on the scored windows, shape ``(windows, seqlen, hidden_size)``."""
        dense = self.lanes[0].hidden_states
        if len(dense) == len(self.input_ids):
            return dense[self.calibration_windows :]
        assert self.inputs.dense_states is not None, "a search by kl captures them"
        return read_dense_states(self.store, self.inputs.dense_states, self.inputs.windows, self.room)

    def _captured(self, layer: int) -> LayerInputs:
        return self.inputs.of_layer(self.store, layer, self.settings)


def _lane_layer(row: dict[str, Any]) -> LaneLayer:
    parts, recovery = row.get("parts"), row.get("recovery")
    return LaneLayer(
        row["error"],
        row["energy"],
        tuple(row["zeros"]),
        parts and LocalErrors(**parts),
        recovery and RecoveryOutcome(**recovery),
    )


def _lane_tensor(lane: int) -> str:
    return f"lane-{lane:03d}"
