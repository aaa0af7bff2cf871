"""An imported checkpoint, opened for reading one decoder layer at a time."""

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from layerwise.storage.artifact import Artifact
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import needed_bytes, read_entries
from layerwise.tasks.models.checkpoint_index import CheckpointIndex, IndexedTensor
from layerwise.tasks.models.tokenizer_files import TokenizerFiles, encoding_identity, tokenizer_identity
from layerwise.tasks.sources.checkpoint_files import copied_files
from layerwise.tasks.sources.folder import Folder
from layerwise.tasks.sources.model_config import config_from_document

INDEX_FILE = "checkpoint.json"


class Checkpoint:
    """A model's configuration, tokenizer and tensors, wherever they lie; tensors are checked when read.

    Args:
        store: where the imported artifact is.
        artifact: what ``import_checkpoint`` made.
        folder: the source, for a checkpoint that is read in place; None when its tensors are in the store.

    Attributes:
        bytes_read: bytes of tensors read so far.
    """

    def __init__(self, store: ArtifactStore, artifact: Artifact, folder: Folder | None) -> None:
        self.artifact = artifact
        self.index = CheckpointIndex.from_json(store.read(artifact, INDEX_FILE))
        self.bytes_read = 0
        self._store, self._folder = store, folder
        self._counting = threading.Lock()

    @cached_property
    def identity(self) -> str:
        """Digest of the configuration and all tensors: the same model elsewhere has the same identity."""
        return self.index.identity

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return config_from_document(self.index.config, self.artifact.key)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.index.num_layers

    @property
    def layer_prefix(self) -> str:
        """Name of the list of decoder layers, e.g. ``model.layers``."""
        return self.index.layer_prefix

    def layer_tensors(self, index: int) -> dict[str, IndexedTensor]:
        """Where the tensors of one decoder layer lie, by their name inside it."""
        return self.index.layer_tensors(index)

    def outer_tensors(self) -> dict[str, IndexedTensor]:
        """Where the tensors outside of the decoder layers lie, by state-dict name."""
        return self.index.outer_tensors()

    def source_tensors(self) -> dict[int | None, list[IndexedTensor]]:
        """All tensors by decoder layer (``None``: outside), those the model has no use for included."""
        return dict(self.index.groups)

    def layers(self, first: int = 0) -> Iterator[dict[str, Tensor]]:
        """The decoder layers from ``first`` on, the next one read in the background while the caller works.

        Two buffers take turns: tensors are valid only until the next layer is asked for. Closing the iterator
        early ends the background thread.

        Yields:
            Tensors by their name inside the layer, in the dtype of the source.

        Raises:
            Corrupt: if a tensor is not the one that was imported.
        """
        layers = [self.layer_tensors(index) for index in range(first, self.num_layers)]
        size = max((_buffer_size(layer.values()) for layer in layers), default=0)
        buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(min(2, len(layers)))]
        with ThreadPoolExecutor(1, thread_name_prefix="layer-reader") as reader:
            arriving = [reader.submit(self.read, layers[0], buffers[0])] if layers else []
            for following in range(1, len(layers) + 1):
                layer = arriving.pop().result()
                if following < len(layers):
                    arriving.append(reader.submit(self.read, layers[following], buffers[following % 2]))
                yield layer

    def read(self, tensors: Mapping[str, IndexedTensor], buffer: Tensor | None = None) -> dict[str, Tensor]:
        """Read some tensors under the names given to them.

        Args:
            buffer: uint8 memory to read into, large enough for ``tensors``; fresh memory if None.

        Raises:
            Corrupt: if a tensor is not the one that was imported; ``Damaged`` if it lies in the store.
            SourceChanged: if a file that is read in place has changed since the checkpoint was opened.
        """
        if buffer is None:
            buffer = torch.empty(_buffer_size(tensors.values()), dtype=torch.uint8)
        found: dict[str, Tensor] = {}  # by the name in the file, which is the one that errors show
        start = 0
        for file, entries in _by_file(tensors.values()).items():
            size = needed_bytes(entries)
            found |= self._read_file(file, entries, buffer[start : start + size])
            start += size
        with self._counting:
            self.bytes_read += sum(tensor.entry.nbytes for tensor in tensors.values())
        return {name: found[tensor.name] for name, tensor in tensors.items()}

    @property
    def tokenizer_identity(self) -> str:
        """Digest of the files that decide how text becomes tokens."""
        return tokenizer_identity({name: file.digest for name, file in self.artifact.files.items()})

    @property
    def encoding_identity(self) -> str:
        """Digest of all that decides the token ids of a text, see ``tokenizer_files.encoding_identity``."""
        return encoding_identity(self.tokenizer_identity, self.index.config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that came with the model.

        Raises:
            ValueError: see ``open_tokenizer``.
        """
        names = copied_files(self.artifact.files)
        contents = {name: self._store.read(self.artifact, name) for name in names}
        return TokenizerFiles(str(self.artifact.facts.get("source")), contents).load()

    def _read_file(self, file: str, entries: Mapping[str, TensorEntry], buffer: Tensor) -> dict[str, Tensor]:
        if self._folder is not None:
            self._folder.require_unchanged(file, bytes_are_checked=True)
            return read_entries(self._folder.fs, self._folder.path(file), entries, buffer)
        with self._store.blaming(self.artifact, file):
            path = f"{self._store.root}/{self._store.file(self.artifact, file).path}"
            return read_entries(self._store.fs, path, entries, buffer)


def _by_file(tensors: Iterable[IndexedTensor]) -> dict[str, dict[str, TensorEntry]]:
    files: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for tensor in tensors:
        files[tensor.file][tensor.name] = tensor.entry
    return files


def _buffer_size(tensors: Iterable[IndexedTensor]) -> int:
    return needed_bytes({tensor.name: tensor.entry for tensor in tensors})
