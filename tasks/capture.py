"""Capture: run the dense model over the calibration and selection windows, layer by layer; resumable."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from layerwise.calibration.capture import capture_layers, embed_windows
from layerwise.models.hidden_states import batches
from layerwise.scoring.perplexity import DIVERGED, perplexity, window_losses
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import write_table
from layerwise.storage.tensors import read_tensor_into, write_tensors
from layerwise.tasks.lanes.dense_states import dense_states_stage, write_dense_states
from layerwise.tasks.lanes.statistics_table import write_statistics
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.dtype_speed import warn_if_slow
from layerwise.tasks.models.streamed import streamed_model
from layerwise.tasks.results.lane_scores import LOSSES_FILE
from layerwise.tasks.results.roles import CALIBRATION_TOKENS
from layerwise.tasks.results.run_names import model_title
from layerwise.tasks.results.selection import DENSE_PERPLEXITY
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.texts.calibrate_on import CalibrateOn, only_if_masked
from layerwise.tasks.texts.token_windows import read_counted, read_input_ids

STATES_FILE = "hidden_states.safetensors"  # of a resume point
SAMPLED_WINDOWS = 4  # of each role, kept with retention "sampled": enough to inspect, small enough to keep

Retention = Literal["none", "sampled", "all"]


@dataclass(frozen=True)
class CaptureSettings:
    """Settings that decide the content of a capture, apart from its inputs.

    Attributes:
        dtype: dtype that the model computes in, e.g. "bfloat16".
        retention: windows whose hidden states are kept at every layer boundary.
        calibrate_on: tokens of the calibration windows that the statistics use.
    """

    dtype: str
    retention: Retention = "none"
    calibrate_on: CalibrateOn = "all"

    @property
    def identity(self) -> dict[str, object]:
        """The settings as part of a key."""
        own = {"type": type(self).__name__, "dtype": self.dtype, "retention": self.retention}
        return {**own, **only_if_masked(self.calibrate_on)}


def capture_stage(
    identity: str, calibration: Artifact, selection: Artifact, settings: CaptureSettings
) -> Stage:
    """Describe a capture; ``identity`` is that of the checkpoint."""
    inputs = {"checkpoint": identity, "calibration": calibration.content, "selection": selection.content}
    return Stage("capture", 1, settings.identity, inputs)


@stage_task(about=lambda checkpoint, **_: model_title(checkpoint))
def capture(
    store: ArtifactStore,
    checkpoint: Checkpoint,
    calibration: Artifact,
    selection: Artifact,
    settings: CaptureSettings,
    execution: Execution,
    keeps_dense_states: bool = False,
) -> Artifact:
    """Record the statistics of every linear's inputs and the dense model's loss on every selection window.

    Returns:
        An artifact with ``statistics/layer-*.parquet`` (calibration windows), ``losses.parquet`` (selection windows)
        and, depending on the retention, ``hidden_states/boundary-*.safetensors``: the inputs of layer ``n`` (the last
        file: of the final norm) as ``calibration`` and ``selection``, shape ``(windows, seqlen, hidden_size)``.

    Args:
        keeps_dense_states: also commit the artifact of ``capture_dense_states``, which a search by the criterion ``kl`` reads.
    """

    def build(draft: Draft) -> None:
        warn_if_slow(settings.dtype, execution)
        windows = [read_input_ids(store, calibration), read_input_ids(store, selection)]
        counted = read_counted(store, calibration, settings.calibrate_on)
        captured = _Capture(store, checkpoint, windows, counted, settings, execution)
        captured.run(draft)
        if keeps_dense_states:
            last = captured.hidden_states[captured.calibration_windows :]
            dense = dense_states_stage(checkpoint.identity, selection, settings.dtype)
            store.get_or_build(dense, lambda beside: write_dense_states(beside, last))

    return store.get_or_build(capture_stage(checkpoint.identity, calibration, selection, settings), build)


@stage_task(name="dense_states", about=lambda checkpoint, **_: model_title(checkpoint))
def capture_dense_states(
    store: ArtifactStore, checkpoint: Checkpoint, selection: Artifact, dtype: str, execution: Execution
) -> Artifact:
    """Run the dense model over the selection windows, unless the capture has kept its hidden states.

    Returns:
        An artifact with ``hidden_states.safetensors``: the output of the last decoder layer in the dtype of the
        computation, one tensor of shape ``(seqlen, hidden_size)`` per window.
    """

    def build(draft: Draft) -> None:
        input_ids = read_input_ids(store, selection)
        model = streamed_model(checkpoint, dtype, execution)
        hidden_states = execution.hidden_states_room().empty(
            (*input_ids.shape, model.layout.size), model.dtype
        )
        embed_windows(model, input_ids, hidden_states, 0)
        first = 0
        if draft.resumed is not None:
            first = draft.resumed.step
            read_tensor_into(store, draft.resumed.state, STATES_FILE, "hidden_states", hidden_states)

        def write_state(state: Draft) -> None:
            write_tensors(state, STATES_FILE, {"hidden_states": hidden_states})

        with (
            boundaries(draft, execution, write_state) as reached,
            showing("dense states: dense model", model.num_layers, first, draft.resumed) as show,
        ):
            for index, weights in enumerate(checkpoint.layers(first, model.device), first):
                with model.loaded(index, weights) as layer:
                    for states in batches(hidden_states):
                        states.copy_(model.run_layer(index, layer, states))
                show(index + 1)
                reached(index + 1)
        write_dense_states(draft, hidden_states)

    return store.get_or_build(dense_states_stage(checkpoint.identity, selection, dtype), build)


class _Capture:
    """A capture in progress."""

    def __init__(
        self,
        store: ArtifactStore,
        checkpoint: Checkpoint,
        windows: list[Tensor],
        counted: Tensor | None,
        settings: CaptureSettings,
        execution: Execution,
    ) -> None:
        self.counted = counted
        self.store, self.checkpoint, self.settings, self.execution = store, checkpoint, settings, execution
        self.read_before = checkpoint.bytes_read
        self.calibration_windows = len(windows[0])
        self.input_ids = torch.cat(windows)
        self.model = streamed_model(checkpoint, settings.dtype, execution)
        room = execution.hidden_states_room()
        self.hidden_states = room.empty((*self.input_ids.shape, self.model.layout.size), self.model.dtype)

    def run(self, draft: Draft) -> None:
        first = self._start(draft)
        layers = self.checkpoint.layers(first, self.model.device)
        with (
            boundaries(draft, self.execution, self._write_state) as reached,
            showing("capture: dense model", self.model.num_layers, first, draft.resumed) as show,
        ):
            captured = capture_layers(
                self.model, layers, self.hidden_states, self.calibration_windows, first, self.counted
            )
            for layer in captured:
                write_statistics(draft, layer.index, layer.statistics)
                self._retain(draft, layer.index + 1)
                show(layer.index + 1)
                reached(layer.index + 1)
            scored = slice(self.calibration_windows, None)
            losses = window_losses(self.model, self.hidden_states[scored], self.input_ids[scored])
        if DIVERGED in losses:
            raise ValueError(
                f"the dense model's loss is not finite on {losses.count(DIVERGED)} of {len(losses)} selection "
                f"windows in {self.settings.dtype}. Compute in another dtype: --dtype bfloat16 or float32."
            )
        write_table(draft, LOSSES_FILE, pa.table({"window": range(len(losses)), "loss": losses}))
        draft.facts |= {
            DENSE_PERPLEXITY: perplexity(losses),
            CALIBRATION_TOKENS: self.input_ids[: self.calibration_windows].numel()
            if self.counted is None
            else int(self.counted.sum()),
            "weights read, bytes": self.checkpoint.bytes_read - self.read_before,
            "first layer of the last attempt": first,
        }

    def _start(self, draft: Draft) -> int:
        """Load the hidden states from the resume point, or embed the windows; return the first layer to run."""
        embed_windows(self.model, self.input_ids, self.hidden_states, self.calibration_windows)
        if draft.resumed is None:
            self._retain(draft, 0)
            return 0
        state = draft.resumed.state
        read_tensor_into(self.store, state, STATES_FILE, "hidden_states", self.hidden_states)
        return draft.resumed.step

    def _write_state(self, state: Draft) -> None:
        write_tensors(state, STATES_FILE, {"hidden_states": self.hidden_states})

    def _retain(self, draft: Draft, boundary: int) -> None:
        if self.settings.retention == "none":
            return
        kept = SAMPLED_WINDOWS if self.settings.retention == "sampled" else None
        tensors = {
            "calibration": self.hidden_states[: self.calibration_windows][:kept],
            "selection": self.hidden_states[self.calibration_windows :][:kept],
        }
        tensors = {role: self.model.hidden_states(states) for role, states in tensors.items()}
        write_tensors(draft, boundary_file(boundary), tensors)


def boundary_file(boundary: int) -> str:
    """Return the name of the file with the inputs of layer ``boundary``; ``num_layers``: of the final norm."""
    return f"hidden_states/boundary-{boundary:05d}.safetensors"
