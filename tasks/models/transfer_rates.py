"""Rates of reading a model and of writing to a store, measured on a bounded number of bytes."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from fsspec import AbstractFileSystem
from xxhash import xxh3_128_digest

from layerwise.display.byte_size import size
from layerwise.models.nan_check import is_finite
from layerwise.storage.files.filesystem import is_local
from layerwise.storage.files.local_disk import drop_from_cache
from layerwise.storage.files.reading import PIECE, WINDOW, read_exactly
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.checkpoint_index import CheckpointIndex, IndexedTensor
from layerwise.tasks.sources.model_source import FolderSource, HubSource, find_source

Place = Callable[[str], tuple[AbstractFileSystem, str]]  # from a file of the model to where it is

MOST_BYTES = 256 << 20  # that are read
MOST_SECONDS = 2.0
FIRST_PIECE = 4 << 20  # bytes; tells whether a whole window of requests takes too long
WRITTEN = 64 << 20  # bytes of the file that is written to the store's disk


@dataclass(frozen=True)
class TransferRates:
    """Bytes per second; None if a rate was not measured.

    Attributes:
        read: weights of the model, read and compared with their checksums.
        imported: weights of a model that is used in place, read and checked by the import.
        written: files of the store.
        notes: sentences on what was measured, and on what was not.
    """

    read: float | None
    imported: float | None
    written: float | None
    notes: tuple[str, ...]


def measure_transfers(
    store: ArtifactStore, model: str, checkpoint: Checkpoint | None, index: CheckpointIndex
) -> TransferRates:
    """Measure where the weights of ``model`` really come from, and the disk of the store. Leaves nothing behind.

    Args:
        checkpoint: the imported model; None if it is not imported yet.
        index: places of its tensors.
    """
    written, from_store, notes = _store_rates(store)
    if checkpoint is not None:
        read, _, note = _read_rates(checkpoint.place, index)
        return TransferRates(read, None, written, (note, *notes))
    source = find_source(model)
    if isinstance(source, FolderSource) and index.in_place:
        folder = source.folder
        read, imported, note = _read_rates(lambda file: (folder.fs, folder.path(file)), index)
        return TransferRates(read, imported, written, (note, *notes))
    copy = f"The {'download' if isinstance(source, HubSource) else 'conversion'} of {source.label} is not in the estimate."
    if from_store is None:
        copy += " Nor is reading it from the store afterwards."
    return TransferRates(from_store, None, written, (copy, *notes))


def _read_rates(place: Place, index: CheckpointIndex) -> tuple[float | None, float | None, str]:
    """Return the rates of reading and of importing, and a sentence about them."""
    buffer = memoryview(bytearray(WINDOW * PIECE))
    total, reading, checking = 0, 0.0, 0.0
    try:
        for tensor, start, length in _pieces(index, len(buffer)):
            fs, path = place(tensor.file)
            offset, part = tensor.entry.offset + start, buffer[:length]
            if is_local(fs):
                drop_from_cache(path, offset, length)  # a large model does not fit into it
            began = time.perf_counter()
            read_exactly(fs, path, offset, part)
            xxh3_128_digest(part)
            read = time.perf_counter()
            is_finite(torch.frombuffer(part, dtype=tensor.entry.torch_dtype))
            checking += time.perf_counter() - read
            total, reading = total + length, reading + read - began
            left = MOST_SECONDS - reading
            if total >= MOST_BYTES or left < reading / total * len(buffer):
                break
    except OSError as error:
        return None, None, f"Reading the model is not in the estimate: {error}"
    where = ", from the disk and not from the system's cache" if is_local(fs) else ""
    note = f"Read {size(total)} of the model at {size(total / reading)}/s{where}."
    return total / reading, total / (reading + checking), note


def _pieces(index: CheckpointIndex, longest: int) -> Iterator[tuple[IndexedTensor, int, int]]:
    """Yield ranges of the layers' tensors, the largest tensors first: tensor, first byte in it, length."""
    inside = [tensor for tensor in index.tensors if tensor.layer is not None and tensor.is_used]
    limit = FIRST_PIECE
    for tensor in sorted(inside, key=lambda tensor: -tensor.entry.nbytes):
        start = 0
        while start < tensor.entry.nbytes:
            length = min(limit, tensor.entry.nbytes - start)
            yield tensor, start, length
            start, limit = start + length, longest


def _store_rates(store: ArtifactStore) -> tuple[float | None, float | None, tuple[str, ...]]:
    """Return the rates of writing to and reading from a local store's disk, and a sentence about them.

    The file has no name, so it disappears even if the process is killed.
    """
    if not store.is_local:
        return None, None, ("Writing to the store is not in the estimate: it would leave an object there.",)
    folder = store.root
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    piece = os.urandom(PIECE)  # a disk may compress other content
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            began = time.perf_counter()
            for _ in range(WRITTEN // PIECE):
                file.write(piece)
            os.fsync(file.fileno())
            writing = time.perf_counter() - began
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            buffer = bytearray(PIECE)
            began = time.perf_counter()
            while file.readinto(buffer):
                xxh3_128_digest(buffer)
            reading = time.perf_counter() - began
    except OSError as error:
        return None, None, (f"Writing to the store is not in the estimate: {error}",)
    written, read = WRITTEN / writing, WRITTEN / reading
    note = f"The store's disk writes {size(written)}/s and reads {size(read)}/s (a file of {size(WRITTEN)})."
    return written, read, (note,)
