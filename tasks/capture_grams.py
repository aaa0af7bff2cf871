"""Capture Gram matrices: second moments of every linear's inputs, for pruners that correct weights.

This is a stage of its own, not a part of ``capture``: captures that were made for Wanda stay valid, and comparisons of
pruners share them. The price is a second pass over the calibration windows.
"""

from layerwise.calibration.capture import capture_grams as grams_of_layers
from layerwise.calibration.capture import embed_windows
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensor_into, write_tensors
from layerwise.tasks.lanes.gram_matrices import TOKENS_FACT, write_grams
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import streamed_model
from layerwise.tasks.results.run_names import model_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.texts.calibrate_on import CalibrateOn, only_if_masked
from layerwise.tasks.texts.token_windows import read_counted, read_input_ids

STATES_FILE = "hidden_states.safetensors"  # of a resume point


def grams_stage(
    identity: str,
    calibration: Artifact,
    dtype: str,
    calibrate_on: CalibrateOn = "all",
    with_sums: bool = False,
) -> Stage:
    """Describe a capture of Gram matrices; ``identity`` is that of the checkpoint."""
    settings: dict[str, object] = {"dtype": dtype, **only_if_masked(calibrate_on)}
    if with_sums:
        settings["sums"] = True
    return Stage("grams", 1, settings, {"checkpoint": identity, "calibration": calibration.content})


@stage_task(about=lambda checkpoint, **_: model_title(checkpoint))
def capture_grams(
    store: ArtifactStore,
    checkpoint: Checkpoint,
    calibration: Artifact,
    dtype: str,
    execution: Execution,
    calibrate_on: CalibrateOn = "all",
    with_sums: bool = False,
) -> Artifact:
    """Run the dense model over the calibration windows; linears that share their input share one matrix.

    Args:
        calibrate_on: tokens that the matrices are summed over.
        with_sums: also write the sums of the inputs, for a pruner that needs their means.

    Returns:
        An artifact with ``grams/layer-*.safetensors``. The tensors of some linears, named by their names joined with "+",
        are panels of the sum of ``x x^T`` over the tokens ``x``, float32: the rows from the one in the name (after "/"; 0
        if absent), without the columns left of it. With sums, ``sums/layer-*.safetensors`` has those of ``x``, float64,
        under the same names.
    """

    def build(draft: Draft) -> None:
        input_ids = read_input_ids(store, calibration)
        counted = read_counted(store, calibration, calibrate_on)
        model = streamed_model(checkpoint, dtype, execution)
        room = execution.hidden_states_room()
        hidden_states = room.empty((*input_ids.shape, model.layout.size), model.dtype)
        embed_windows(model, input_ids, hidden_states, len(input_ids))
        first = 0
        if draft.resumed is not None:
            first = draft.resumed.step
            read_tensor_into(store, draft.resumed.state, STATES_FILE, "hidden_states", hidden_states)

        def write_state(state: Draft) -> None:
            write_tensors(state, STATES_FILE, {"hidden_states": hidden_states})

        with (
            boundaries(draft, execution, write_state) as reached,
            showing("grams: dense model", model.num_layers, first, draft.resumed) as show,
        ):
            layers = grams_of_layers(
                model, checkpoint.layers(first, model.device), hidden_states, first, counted, with_sums
            )
            for index, grams in enumerate(layers, first):
                write_grams(draft, index, grams)
                show(index + 1)
                reached(index + 1)
        draft.facts[TOKENS_FACT] = input_ids.numel() if counted is None else int(counted.sum())

    stage = grams_stage(checkpoint.identity, calibration, dtype, calibrate_on, with_sums)
    return store.get_or_build(stage, build)
