"""Capture: the dense model's pass over calibration and selection windows, layer by layer, resumable."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from layerwise.calibration.capture import capture_layers, embed_windows
from layerwise.models.hidden_states import HiddenStatesRoom
from layerwise.scoring.perplexity import DIVERGED, perplexity, window_losses
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import write_table
from layerwise.storage.tensors import read_tensor_into, write_tensors
from layerwise.tasks.lanes.layer_boundaries import boundaries
from layerwise.tasks.lanes.statistics_table import write_statistics
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.dtype_speed import warn_if_slow
from layerwise.tasks.models.streamed import streamed_model
from layerwise.tasks.results.run_names import model_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.progress import showing
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sample_tokens import read_input_ids

LOSSES_FILE = "losses.parquet"
DENSE_PERPLEXITY = "dense selection perplexity"  # a fact of the artifact
STATES_FILE = "hidden_states.safetensors"
SAMPLED_WINDOWS = 4  # of each kind, kept with retention "sampled": enough to look at, small enough to keep

Retention = Literal["none", "sampled", "all"]


@dataclass(frozen=True)
class CaptureSettings:
    """Everything that decides what a capture holds, apart from its inputs.

    Attributes:
        dtype: in which the model computes, e.g. "bfloat16".
        retention: which windows' hidden states are kept at every layer boundary.
    """

    dtype: str
    retention: Retention = "none"


def capture_stage(
    identity: str, calibration: Artifact, selection: Artifact, settings: CaptureSettings
) -> Stage:
    """The stage of a capture; ``identity`` is the checkpoint's."""
    inputs = {"checkpoint": identity, "calibration": calibration.content, "selection": selection.content}
    return Stage("capture", 1, settings, inputs)


@stage_task(about=lambda checkpoint, **_: model_title(checkpoint))
def capture(
    store: ArtifactStore,
    checkpoint: Checkpoint,
    calibration: Artifact,
    selection: Artifact,
    settings: CaptureSettings,
    execution: Execution,
) -> Artifact:
    """Statistics of every linear's inputs, the dense loss per selection window, hidden states as retained.

    Returns:
        An artifact with ``statistics/layer-*.parquet`` (calibration windows), ``losses.parquet`` (selection
        windows) and, as retained, ``hidden_states/boundary-*.safetensors``: what goes into layer ``n`` (and,
        last, into the final norm), ``calibration`` and ``selection`` of shape ``(windows, seqlen,
        hidden_size)``.
    """

    def build(draft: Draft) -> None:
        warn_if_slow(settings.dtype, execution)
        windows = [read_input_ids(store, calibration), read_input_ids(store, selection)]
        _Capture(store, checkpoint, windows, settings, execution).run(draft)

    return store.get_or_build(capture_stage(checkpoint.identity, calibration, selection, settings), build)


class _Capture:
    """One capture on its way."""

    def __init__(
        self,
        store: ArtifactStore,
        checkpoint: Checkpoint,
        windows: list[Tensor],
        settings: CaptureSettings,
        execution: Execution,
    ) -> None:
        self.store, self.checkpoint, self.settings, self.execution = store, checkpoint, settings, execution
        self.read_before = checkpoint.bytes_read
        self.calibration_windows = len(windows[0])
        self.input_ids = torch.cat(windows)
        self.model = streamed_model(checkpoint, settings.dtype, execution)
        room = HiddenStatesRoom(execution.hidden_states_bytes, execution.scratch)
        hidden_size = checkpoint.config.get_text_config().hidden_size
        self.hidden_states = room.empty((*self.input_ids.shape, hidden_size), self.model.dtype)

    def run(self, draft: Draft) -> None:
        first = self._start(draft)
        layers = self.checkpoint.layers(first)
        with (
            boundaries(draft, self.execution, self._write_state) as reached,
            showing("capture: dense model", self.model.num_layers, first, draft.resumed) as show,
        ):
            captured = capture_layers(self.model, layers, self.hidden_states, self.calibration_windows, first)
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
            "calibration tokens": self.input_ids[: self.calibration_windows].numel(),
            "weights read, bytes": self.checkpoint.bytes_read - self.read_before,
            "first layer of the last attempt": first,
        }

    def _start(self, draft: Draft) -> int:
        """The layer to begin with; the hidden states are those that go into it."""
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
        write_tensors(draft, boundary_file(boundary), tensors)


def boundary_file(boundary: int) -> str:
    """Hidden states that go into layer ``boundary``; ``num_layers``: into the final norm."""
    return f"hidden_states/boundary-{boundary:05d}.safetensors"
