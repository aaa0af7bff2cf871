"""Imported checkpoint, read one decoder layer at a time."""

import threading
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from fsspec import AbstractFileSystem
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layerwise.models.device_copies import DeviceCopies
from layerwise.models.experts import FusedTensor, fused_tensors
from layerwise.models.prunable_linears import dense_linears, dense_rows
from layerwise.storage.artifact import Artifact
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import needed_bytes, read_through
from layerwise.tasks.models.checkpoint_index import (
    CheckpointIndex,
    IndexedTensor,
    ModelWeight,
)
from layerwise.tasks.models.tokenizer import TokenizerFiles, encoding_identity, tokenizer_identity
from layerwise.tasks.models.weight_conversion import (
    Conversion,
    StoredNames,
    model_weights,
    parameter_names,
    require_same_conversions,
    stored_tensors_of,
)
from layerwise.tasks.sources.checkpoint_files import copied_files
from layerwise.tasks.sources.folder import Folder
from layerwise.tasks.sources.model_config import config_from_document, outline_from_document

INDEX_FILE = "checkpoint.json"


class Checkpoint:
    """Configuration, tokenizer and tensors of a model, in place or in the store. Tensors are checked when read.

    Args:
        store: store that holds ``artifact``.
        artifact: an artifact of ``import_checkpoint``.
        folder: source folder of the checkpoint, if it has one; used only if the tensors are read in place.

    Attributes:
        bytes_read: bytes of tensors read so far.
    """

    def __init__(self, store: ArtifactStore, artifact: Artifact, folder: Folder | None) -> None:
        self.artifact = artifact
        self.index = CheckpointIndex.from_json(store.read(artifact, INDEX_FILE))
        self.bytes_read = 0
        self._store, self._folder = store, folder if self.index.in_place else None
        self._counting = threading.Lock()

    @cached_property
    def identity(self) -> str:
        """Digest of the configuration and all tensors; equal for copies of a model in different places.

        Linears that layerwise does not prune are part of it, because versions of layerwise and transformers differ in them.
        """
        dense = dense_linears(outline_from_document(self.index.config, self.artifact.key))
        identity = self.index.identity
        return digest({"checkpoint": identity, "dense linears": dense}) if dense else identity

    @cached_property
    def dense_rows(self) -> list[dict[str, Any]]:
        """Linears that stay dense by default, with the reason, see ``prunable_linears.dense_rows``."""
        return dense_rows(outline_from_document(self.index.config, self.artifact.key))

    @cached_property
    def config(self) -> PretrainedConfig:
        """Configuration of the model."""
        return config_from_document(self.index.config, self.artifact.key)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.index.num_layers

    @property
    def layer_prefix(self) -> str:
        """Name of the list of decoder layers, e.g. ``model.layers``."""
        return self.index.layer_prefix

    def layer_tensors(self, index: int) -> dict[str, ModelWeight]:
        """Return the weights of one decoder layer by their name inside the layer, as in transformers: experts are fused."""
        return self.index.layer_tensors(index)

    def outer_tensors(self) -> dict[str, ModelWeight]:
        """Return the weights outside of the decoder layers by state-dict name."""
        return self.index.outer_tensors()

    def source_tensors(self) -> dict[int | None, list[IndexedTensor]]:
        """Return all tensors, including unused ones, by decoder layer; ``None`` is the key of those outside."""
        return dict(self.index.groups)

    def layers(
        self,
        first: int = 0,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    ) -> Generator[dict[str, Tensor], None, None]:
        """Read the decoder layers from ``first`` on; the next layer is read in the background while the caller works.

        Two buffers are used alternately, so tensors are valid only until the next layer is requested. Closing the
        iterator early ends the background thread. For CUDA, this thread also copies the next layer to the device, through
        one buffer of pinned memory.

        Yields:
            Tensors by their name inside the layer, in the dtype of the source, on ``device``; those of experts one by one
            (``mlp.experts.0.up_proj.weight``).

        Raises:
            Corrupt: a tensor differs from the one that was imported.
        """
        layers = [self.layer_tensors(index) for index in range(first, self.num_layers)]
        size = max((self._buffer_size(layer.values()) for layer in layers), default=0)
        copies = DeviceCopies(device)
        count = min(1 if copies.in_background else 2, len(layers))
        buffers = [
            torch.empty(size, dtype=torch.uint8, pin_memory=copies.in_background) for _ in range(count)
        ]

        def arrive(number: int) -> dict[str, Tensor]:
            return copies.begin(self.read(layers[number], buffers[number % count]))

        with ThreadPoolExecutor(1, thread_name_prefix="layer-reader") as reader:
            arriving = [reader.submit(arrive, 0)] if layers else []
            for following in range(1, len(layers) + 1):
                layer = copies.finish(arriving.pop().result())
                if following < len(layers):
                    arriving.append(reader.submit(arrive, following))
                yield layer

    def read(self, tensors: Mapping[str, ModelWeight], buffer: Tensor | None = None) -> dict[str, Tensor]:
        """Read tensors and return them under the given names; weights in another layout are converted, experts separated.

        Args:
            tensors: tensors to read, by their name in the result.
            buffer: uint8 memory to read into, large enough for ``tensors``; None to allocate new memory.

        Raises:
            Corrupt: a tensor differs from the one that was imported; ``Damaged`` if it is in the store.
            SourceChanged: a file that is read in place has changed since the checkpoint was opened.
        """
        parts = self.index.stored_tensors(tensors.values())
        if buffer is None:
            buffer = torch.empty(_size_of(parts), dtype=torch.uint8)
        found: dict[str, Tensor] = {}  # by name in the file, which errors refer to
        start = 0
        for file, entries in _by_file(parts).items():
            size = needed_bytes(entries)
            found |= self._read_file(file, entries, buffer[start : start + size])
            start += size
        with self._counting:
            self.bytes_read += sum(tensor.entry.nbytes for tensor in parts)
        return model_weights(tensors, found, self._conversions, self._experts)

    def layer_by_stored_name(self, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``weights`` of a decoder layer under the names and in the layout of the files.

        The result includes stored tensors of the layer that the model does not use. A weight that layers share belongs to
        the layer that it is stored for.

        Args:
            weights: all weights of the layer, by name inside it, those of experts one by one.
        """
        own = {name: weight for name, weight in self.layer_tensors(index).items() if weight.layer == index}
        stored = stored_tensors_of(weights, own, self._conversions, self._experts)
        unused = {tensor.name: tensor for tensor in self.index.groups[index] if not tensor.is_used}
        return self._in_stored_dtype(stored) | self.read(unused)

    def _in_stored_dtype(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``tensors`` in the dtypes of the files: a conversion of tensors of several dtypes makes one of them."""
        dtypes = {
            tensor.name: tensor.entry.torch_dtype for tensor in self.index.tensors if tensor.name in tensors
        }
        return {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}

    @cached_property
    def _conversions(self) -> tuple[Conversion, ...]:
        if not self.index.converted:
            return ()
        conversions = StoredNames((tensor.name for tensor in self.index.tensors), self._outline).conversions
        require_same_conversions(conversions, self.index.tensors, self.artifact.key)
        return conversions

    @cached_property
    def _experts(self) -> Mapping[str, FusedTensor]:
        """Tensors with the weights of all experts of a layer, by state-dict name."""
        return fused_tensors(self._outline) if self.index.may_have_experts else {}

    @property
    def parameter_names(self) -> dict[str, str]:
        """Names of the parameters by the names of the tensors in the files.

        Raises:
            ValueError: see ``weight_conversion.parameter_names``.
        """
        return parameter_names(self.index.tensors, self._conversions, self._experts)

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        return bool(self._experts)

    @cached_property
    def _outline(self) -> PreTrainedModel:
        return outline_from_document(self.index.config, self.artifact.key)

    def _buffer_size(self, weights: Iterable[ModelWeight]) -> int:
        return _size_of(self.index.stored_tensors(weights))

    @property
    def tokenizer_identity(self) -> str:
        """Digest of the files that decide how text becomes tokens."""
        return tokenizer_identity({name: file.digest for name, file in self.artifact.files.items()})

    @property
    def encoding_identity(self) -> str:
        """Digest of everything that decides the token ids of a text, see ``tokenizer.encoding_identity``."""
        return encoding_identity(self.tokenizer_identity, self.index.config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Open the tokenizer that came with the model.

        Raises:
            ValueError: see ``open_tokenizer``.
        """
        names = copied_files(self.artifact.files)
        contents = {name: self._store.read(self.artifact, name) for name in names}
        return TokenizerFiles(str(self.artifact.facts.get("source")), contents).load()

    def place(self, file: str) -> tuple[AbstractFileSystem, str]:
        """Return the file system and the path of a file with tensors."""
        if self._folder is not None:
            return self._folder.fs, self._folder.path(file)
        return self._store.fs, f"{self._store.root}/{self._store.file(self.artifact, file).path}"

    def _read_file(self, file: str, entries: Mapping[str, TensorEntry], buffer: Tensor) -> dict[str, Tensor]:
        if self._folder is not None:
            self._folder.require_unchanged(file, bytes_are_checked=True)
            return read_through(self._store.layer_cache, *self.place(file), entries, buffer)
        with self._store.blaming(self.artifact, file):
            return read_through(self._store.layer_cache, *self.place(file), entries, buffer)


def _by_file(tensors: Iterable[IndexedTensor]) -> dict[str, dict[str, TensorEntry]]:
    files: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for tensor in tensors:
        files[tensor.file][tensor.name] = tensor.entry
    return files


def _size_of(tensors: Iterable[IndexedTensor]) -> int:
    return needed_bytes({tensor.name: tensor.entry for tensor in tensors})
