"""Windows of token ids, as ``sample_tokens`` stores them."""

from torch import Tensor

from layerwise.storage.artifact import Artifact
from layerwise.storage.formats.tensors import read_tensors
from layerwise.storage.store import ArtifactStore

TOKENS_FILE = "tokens.safetensors"


def read_input_ids(store: ArtifactStore, artifact: Artifact) -> Tensor:
    """Return the token ids of an artifact of ``sample_tokens``, int64, shape ``(windows, seqlen)``."""
    return read_tensors(store, artifact, TOKENS_FILE)["input_ids"]
