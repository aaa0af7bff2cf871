"""Windows of token ids, as ``sample_tokens`` stores them."""

from torch import Tensor

from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors

TOKENS_FILE = "tokens.safetensors"


def read_input_ids(store: ArtifactStore, artifact: Artifact) -> Tensor:
    """Return the token ids of an artifact of ``sample_tokens``, int64, shape ``(windows, seqlen)``."""
    return read_tensors(store, artifact, TOKENS_FILE)["input_ids"]
