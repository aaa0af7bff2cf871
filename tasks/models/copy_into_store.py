"""Copy a checkpoint into the store, one shard per decoder layer; resumable after every shard."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import add_to_cache, write_tensors
from layerwise.tasks.models.checkpoint_index import CheckpointIndex, IndexedTensor
from layerwise.tasks.models.finite_weights import require_finite
from layerwise.tasks.models.folder_index import read_size, read_tensors_of
from layerwise.tasks.running.progress import showing
from layerwise.tasks.running.stopping import stop, stop_deferred
from layerwise.tasks.sources.folder import Folder

if TYPE_CHECKING:
    from layerwise.tasks.models.gguf_weights import GgufWeights

Shard = Sequence[IndexedTensor]


def copy_into_store(
    store: ArtifactStore, draft: Draft, folder: Folder, index: CheckpointIndex
) -> CheckpointIndex:
    """Copy the tensors of ``folder`` by ranged reads through one buffer of the size of a shard.

    Quantized weights are dequantized.

    Returns:
        The index with the places of the copies.

    Raises:
        Corrupt: a file is shorter than its header says, or cannot be read.
    """
    shards = _shards(index)
    buffer = torch.empty(max(map(read_size, shards.values())), dtype=torch.uint8)

    def read(shard: Shard) -> dict[str, Tensor]:
        return read_tensors_of(folder, shard, buffer)

    return _write_shards(store, draft, index, shards, read)


def convert_gguf(
    store: ArtifactStore, draft: Draft, weights: "GgufWeights", require_unchanged: Callable[[], None]
) -> CheckpointIndex:
    """Dequantize a GGUF file into the store.

    Args:
        require_unchanged: raises an error if the file has changed; called before every shard is written.

    Returns:
        The index with the places of the dequantized weights.

    Raises:
        ValueError: a shape does not match the file's metadata.
    """

    def dequantize(shard: Shard) -> dict[str, Tensor]:
        tensors = {tensor.name: weights.tensor(tensor.name) for tensor in shard}
        require_unchanged()
        return tensors

    return _write_shards(store, draft, weights.index, _shards(weights.index), dequantize)


def _no_state(state: Draft) -> None:
    """Write nothing: the shards written so far are all that a resume point needs."""


def _write_shards(
    store: ArtifactStore,
    draft: Draft,
    index: CheckpointIndex,
    shards: Mapping[str, Shard],
    read: Callable[[Shard], dict[str, Tensor]],
) -> CheckpointIndex:
    located = []
    done, imported = len(draft.files), 0
    title = "import: copy into the store"
    with stop_deferred() as asked_to_stop, showing(title, len(shards), done, draft.resumed, "shard") as show:
        for step, (file, shard) in enumerate(shards.items(), start=1):
            if file not in draft.files:
                weights = read(shard)
                for tensor in shard:
                    if tensor.is_used:
                        require_finite(weights[tensor.name], tensor.name, tensor.file)
                imported += sum(tensor.entry.nbytes for tensor in shard)
                write_tensors(draft, file, weights, metadata={"format": "pt"})
                add_to_cache(store, draft.files[file], weights)
                show(step)
                draft.save_resume_point(step, _no_state)
            if asked_to_stop():
                stop()
            entries = draft.files[file].tensors
            assert entries is not None, "write_tensors records the place of every tensor"
            located += [
                replace(tensor, file=file, entry=entries[tensor.name], quantized=None) for tensor in shard
            ]
    draft.facts["weights read, bytes"] = imported
    return replace(index, in_place=False, tensors=tuple(located))


def _shards(index: CheckpointIndex) -> Mapping[str, Shard]:
    """Assign tensors to files: one file per layer; tensors outside of the layers fill files of the size of a layer.

    With a large vocabulary, embedding and head are each larger than a layer; one file for both would double the memory.
    """
    shards: dict[str, list[IndexedTensor]] = {}
    room, count = 0, 0
    for tensor in index.groups[None]:
        if tensor.entry.nbytes > room:
            room, count = max(index.layer_bytes), count + 1
        room -= tensor.entry.nbytes
        shards.setdefault(f"outer-{count - 1:05d}.safetensors", []).append(tensor)
    for layer in range(index.num_layers):
        shards[f"layer-{layer:05d}.safetensors"] = index.groups[layer]
    return shards
