"""Windows of token ids, as ``sample_tokens`` stores them."""

from torch import Tensor

from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors
from layerwise.tasks.texts.calibrate_on import CalibrateOn

TOKENS_FILE = "tokens.safetensors"
INPUT_IDS, RESPONSES = "input_ids", "responses"  # tensors of the file; only conversations have responses


def read_input_ids(store: ArtifactStore, artifact: Artifact) -> Tensor:
    """Return the token ids of an artifact of ``sample_tokens``, int64, shape ``(windows, seqlen)``."""
    return read_tensors(store, artifact, TOKENS_FILE, [INPUT_IDS])[INPUT_IDS]


def read_counted(store: ArtifactStore, artifact: Artifact, calibrate_on: CalibrateOn) -> Tensor | None:
    """Return the mask of the tokens that a calibration uses, shape ``(windows, seqlen)``; None if it uses all.

    All tokens of a window of plain text are used, because such a text has no responses. A window without a response is one
    of plain text: windows of conversations without any are refused before (``sample_tokens.require_responses``).
    """
    if calibrate_on == "all":
        return None
    responses = read_tensors(store, artifact, TOKENS_FILE, [RESPONSES])[RESPONSES]
    counted = responses | ~responses.any(dim=1, keepdim=True)
    return None if counted.all() else counted


def read_responses(store: ArtifactStore, artifact: Artifact) -> Tensor | None:
    """Return the mask of the responses, shape ``(windows, seqlen)``; None if no predicted token belongs to one."""
    if RESPONSES not in (artifact.files[TOKENS_FILE].tensors or {}):
        return None
    responses = read_tensors(store, artifact, TOKENS_FILE, [RESPONSES])[RESPONSES]
    return responses if responses[:, 1:].any() else None


def shape_of(windows: Artifact) -> tuple[int, int]:
    """Return the number of windows and their length in tokens, without reading them."""
    entries = windows.files[TOKENS_FILE].tensors
    assert entries is not None, "write_tensors records where tensors lie"
    count, seqlen = entries[INPUT_IDS].shape
    return count, seqlen
