"""Capture Gram matrices: second moments of every linear's inputs, for pruners that correct weights.

A stage of its own, and not a part of ``capture``, so that a store whose captures were made for Wanda keeps them all,
and comparisons of pruners share them. It costs the calibration windows' pass once more.
"""

from collections.abc import Iterator, Sequence

from layerwise.calibration.capture import capture_grams as grams_of_layers
from layerwise.calibration.capture import embed_windows
from layerwise.calibration.gram import InputGram, linears_by_input
from layerwise.models.hidden_states import HiddenStatesRoom
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensor_into, read_tensors, write_tensors
from layerwise.tasks.lanes.layer_boundaries import boundaries
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import streamed_model
from layerwise.tasks.results.run_names import model_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.progress import showing
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sample_tokens import read_input_ids

STATES_FILE = "hidden_states.safetensors"
TOKENS = "calibration tokens"  # a fact of the artifact
BETWEEN = "+"  # the names of linears that share their input


def grams_stage(identity: str, calibration: Artifact, dtype: str) -> Stage:
    """The stage of a capture of Gram matrices; ``identity`` is the checkpoint's."""
    return Stage("grams", 1, {"dtype": dtype}, {"checkpoint": identity, "calibration": calibration.content})


@stage_task(about=lambda checkpoint, **_: model_title(checkpoint))
def capture_grams(
    store: ArtifactStore, checkpoint: Checkpoint, calibration: Artifact, dtype: str, execution: Execution
) -> Artifact:
    """Take the calibration windows through the dense model; one matrix for linears that share their input.

    Returns:
        An artifact with ``grams/layer-*.safetensors``: by the names of the linears, joined by "+", the sum of ``x x^T``
        over the tokens ``x``, float32, shape ``(in_features, in_features)``.
    """

    def build(draft: Draft) -> None:
        input_ids = read_input_ids(store, calibration)
        model = streamed_model(checkpoint, dtype, execution)
        room = HiddenStatesRoom(execution.hidden_states_bytes, execution.scratch)
        hidden_size = checkpoint.config.get_text_config().hidden_size
        hidden_states = room.empty((*input_ids.shape, hidden_size), model.dtype)
        embed_windows(model, input_ids, hidden_states, len(input_ids))
        first = 0
        if draft.resumed is not None:
            first = draft.resumed.step
            read_tensor_into(store, draft.resumed.state, STATES_FILE, "hidden_states", hidden_states)
        with (
            boundaries(
                draft,
                execution,
                lambda state: write_tensors(state, STATES_FILE, {"hidden_states": hidden_states}),
            ) as reached,
            showing("grams: dense model", model.num_layers, first, draft.resumed) as show,
        ):
            layers = grams_of_layers(model, checkpoint.layers(first), hidden_states, first)
            for index, of_layer in enumerate(layers, first):
                grams = {BETWEEN.join(names): of_layer[names[0]].gram for names in linears_by_input(of_layer)}
                write_tensors(draft, _grams_file(index), grams)
                show(index + 1)
                reached(index + 1)
        draft.facts[TOKENS] = input_ids.numel()

    return store.get_or_build(grams_stage(checkpoint.identity, calibration, dtype), build)


def read_grams(
    store: ArtifactStore, artifact: Artifact, layer: int
) -> Iterator[tuple[Sequence[str], InputGram]]:
    """The Gram matrices of one layer, one in memory at a time, each with the names of its linears."""
    name = _grams_file(layer)
    tokens = int(str(artifact.facts[TOKENS]))
    for key in store.file(artifact, name).tensors or {}:
        yield key.split(BETWEEN), InputGram(read_tensors(store, artifact, name, [key])[key], tokens)


def _grams_file(layer: int) -> str:
    return f"grams/layer-{layer:05d}.safetensors"
