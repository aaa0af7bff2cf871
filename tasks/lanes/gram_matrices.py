"""Gram matrices as safetensors: one file per decoder layer, one matrix for linears that share their input.

The matrices are symmetric, so only the panels of their upper triangle are stored. Stores of older versions have whole
matrices, which are read as well. Factors and inverses are not stored: they belong to one pruner and its damping, while
the matrices serve all pruners and allocators.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

import torch

from layerwise.calibration.few_tokens import moments_to_prune_by
from layerwise.calibration.gram import InputGram, linears_by_input
from layerwise.calibration.upper_triangle import fill_symmetric, upper_panels
from layerwise.models.expert_names import expert_linear
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors, write_tensors

TOKENS_FACT = "calibration tokens"  # fact of the artifact
SEPARATOR = "+"  # between the names of linears that share their input
ROW_MARK = "/"  # before the first row of a panel; a panel without it begins at row 0


def write_grams(draft: Draft, layer: int, grams: Mapping[str, InputGram]) -> None:
    """Write the matrices of one layer to prune by, with one panel at a time copied.

    Experts that few tokens reached share a matrix, see ``moments_to_prune_by``.

    Args:
        grams: by linear; linears that share their input have the same object.
    """
    used = moments_to_prune_by(grams)
    groups = linears_by_input(used)
    panels = {
        SEPARATOR.join(names) + (f"{ROW_MARK}{first}" if first else ""): panel
        for names in groups
        for first, panel in upper_panels(used[names[0]].gram)
    }
    write_tensors(draft, _grams_file(layer), panels)
    sums = {SEPARATOR.join(names): used[names[0]].sums for names in groups}
    if found := {name: each for name, each in sums.items() if each is not None}:
        write_tensors(draft, _sums_file(layer), found)
    if any(expert_linear(name) is not None for name in used):
        tokens = {SEPARATOR.join(names): used[names[0]].tokens for names in groups}
        draft.write(_tokens_file(layer), json.dumps(tokens).encode())


def read_grams(
    store: ArtifactStore, artifact: Artifact, layer: int
) -> Iterator[tuple[Sequence[str], InputGram]]:
    """Read the matrices of one layer, one at a time.

    Yields:
        Names of the linears that share an input, and the Gram matrix of that input, which the caller may overwrite.
    """
    name = _grams_file(layer)
    every_token = int(str(artifact.facts[TOKENS_FACT]))
    tokens: dict[str, int] = {}  # by linears; only experts do not get every token
    if _tokens_file(layer) in artifact.files:
        tokens = json.loads(store.read(artifact, _tokens_file(layer)))
    entries = store.file(artifact, name).tensors or {}
    has_sums = _sums_file(layer) in artifact.files
    sums = read_tensors(store, artifact, _sums_file(layer)) if has_sums else {}
    rows_of: dict[str, dict[int, str]] = {}  # by linears: keys of the panels by first row
    for key in entries:
        linears, _, first = key.partition(ROW_MARK)
        rows_of.setdefault(linears, {})[int(first or 0)] = key

    for linears, keys in rows_of.items():
        if len(keys) == 1:
            (key,) = keys.values()
            gram = read_tensors(store, artifact, name, [key])[key]
        else:
            size = entries[keys[0]].shape[1]
            gram = fill_symmetric(
                torch.empty(size, size),
                ((first, read_tensors(store, artifact, name, [key])[key]) for first, key in keys.items()),
            )
        yield linears.split(SEPARATOR), InputGram(gram, tokens.get(linears, every_token), sums.get(linears))


def _sums_file(layer: int) -> str:
    return f"sums/layer-{layer:05d}.safetensors"


def _grams_file(layer: int) -> str:
    return f"grams/layer-{layer:05d}.safetensors"


def _tokens_file(layer: int) -> str:
    return f"grams/tokens-{layer:05d}.json"
