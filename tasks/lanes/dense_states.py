"""Dense states: the dense model's output of the last decoder layer on the selection windows.

The criterion ``kl`` compares every pruned model's distribution of the next token with the dense model's. The dense
probabilities of a window are as large as its logits, so they are not stored: the model's norm and head are applied to
these hidden states instead, which is exact.
"""

from torch import Tensor

from layerwise.models.hidden_states import HiddenStatesRoom
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensor_into, write_tensors

STATES_FILE = "hidden_states.safetensors"


def dense_states_stage(identity: str, selection: Artifact, dtype: str) -> Stage:
    """Describe the hidden states of the dense model; ``identity`` is that of the checkpoint."""
    return Stage(
        "dense_states", 1, {"dtype": dtype}, {"checkpoint": identity, "selection": selection.content}
    )


def write_dense_states(draft: Draft, hidden_states: Tensor) -> None:
    """Write hidden states, shape ``(windows, seqlen, hidden_size)``, one tensor per window."""
    write_tensors(
        draft, STATES_FILE, ((_name(number), window) for number, window in enumerate(hidden_states))
    )


def read_dense_states(
    store: ArtifactStore, artifact: Artifact, windows: tuple[int, int] | None, room: HiddenStatesRoom
) -> Tensor:
    """Read the hidden states of a range of windows, shape ``(windows, seqlen, hidden_size)``.

    Args:
        windows: first window, and one past the last; None for all.
        room: takes the hidden states.
    """
    entries = artifact.files[STATES_FILE].tensors
    assert entries is not None, "write_tensors records where tensors lie"
    first, end = windows or (0, len(entries))
    entry = entries[_name(first)]
    hidden_states = room.empty((end - first, *entry.shape), entry.torch_dtype)
    for number, window in enumerate(hidden_states, first):
        read_tensor_into(store, artifact, STATES_FILE, _name(number), window)
    return hidden_states


def _name(window: int) -> str:
    return f"window-{window:05d}"
