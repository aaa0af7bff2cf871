"""Gram matrices as safetensors: one file per decoder layer, one matrix for linears that share their input."""

from collections.abc import Iterator, Mapping, Sequence

from layerwise.calibration.gram import InputGram, linears_by_input
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors, write_tensors

TOKENS_FACT = "calibration tokens"  # fact of the artifact
SEPARATOR = "+"  # between the names of linears that share their input


def write_grams(draft: Draft, layer: int, grams: Mapping[str, InputGram]) -> None:
    """Write the matrices of one layer.

    Args:
        grams: by linear; linears that share their input have the same object.
    """
    tensors = {SEPARATOR.join(names): grams[names[0]].gram for names in linears_by_input(grams)}
    write_tensors(draft, _grams_file(layer), tensors)


def read_grams(
    store: ArtifactStore, artifact: Artifact, layer: int
) -> Iterator[tuple[Sequence[str], InputGram]]:
    """Read the matrices of one layer, one at a time.

    Yields:
        Names of the linears that share an input, and the Gram matrix of that input.
    """
    name = _grams_file(layer)
    tokens = int(str(artifact.facts[TOKENS_FACT]))
    for key in store.file(artifact, name).tensors or {}:
        yield key.split(SEPARATOR), InputGram(read_tensors(store, artifact, name, [key])[key], tokens)


def _grams_file(layer: int) -> str:
    return f"grams/layer-{layer:05d}.safetensors"
