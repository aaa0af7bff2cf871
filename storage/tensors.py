"""Named tensors in safetensors files: written as a stream, read by byte ranges, checked by digest."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from fsspec import AbstractFileSystem
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from layerwise.storage.artifact import Artifact, StoredFile
from layerwise.storage.draft import Draft
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.files.reading import read_exactly, read_scattered
from layerwise.storage.formats.safetensors_header import METADATA, encode_header
from layerwise.storage.formats.tensor_entry import DTYPE_NAMES, TensorEntry, dtype_name
from layerwise.storage.layer_cache import LayerCache
from layerwise.storage.store import ArtifactStore

ALIGNMENT = 64  # bytes: a cache line, and the alignment of torch's own allocator


def write_tensors(
    draft: Draft,
    name: str,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file, with one tensor at a time in memory (on the CPU, contiguous).

    The manifest records the place and the digest of each tensor.

    Args:
        tensors: by name; on any device, in any memory layout.
        metadata: free text in the header, such as ``{"format": "pt"}``.

    Raises:
        TypeError: safetensors does not support a dtype.
        ValueError: a tensor is named ``__metadata__``.
    """
    # Widest first, as the official writer does: then every tensor is aligned to its own item size.
    ordered = dict(sorted(dict(tensors).items(), key=lambda item: -item[1].element_size()))
    if METADATA in ordered:
        raise ValueError(f"{name}: a tensor is named {METADATA!r}, which the format reserves. Rename it.")
    shapes = {key: (_dtype_name(name, key, tensor), tuple(tensor.shape)) for key, tensor in ordered.items()}
    header, places = encode_header(shapes, metadata)
    entries: dict[str, TensorEntry] = {}

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        for key, tensor in ordered.items():
            data = _bytes_of(tensor)
            place = places[key]
            entries[key] = TensorEntry(place.dtype, place.shape, place.offset, xxh3_128_hexdigest(data))
            yield data

    size = len(header) + sum(tensor.nbytes for tensor in ordered.values())
    draft.write(name, pieces(), tensors=entries, expected_size=size)


def read_tensors(
    store: ArtifactStore, artifact: Artifact, name: str, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Read tensors of one file of an artifact, each checked against the manifest.

    Args:
        names: of the tensors to read; None for all.

    Raises:
        KeyError: the artifact has no such file, or the file no such tensor.
        Corrupt: the file is missing, truncated, or differs from what was written.
    """
    file = store.file(artifact, name)
    if file.tensors is None:
        raise KeyError(f"{artifact.key}: {name!r} was not written by write_tensors. Use store.read instead.")
    wanted = list(file.tensors if names is None else names)
    if unknown := [key for key in wanted if key not in file.tensors]:
        raise KeyError(f"{artifact.key}: {name!r} has no tensor {unknown}; it has {sorted(file.tensors)}")
    entries = {key: file.tensors[key] for key in wanted}
    with store.blaming(artifact, name):
        return read_entries(store.fs, store.path(file.path), entries)


def read_tensor_into(
    store: ArtifactStore, artifact: Artifact, name: str, key: str, destination: Tensor
) -> None:
    """Read one tensor of an artifact into an existing tensor, checked against the manifest.

    Args:
        key: name of the tensor in the file.
        destination: contiguous tensor of the same dtype and shape; on another device than the CPU it takes a copy.

    Raises:
        KeyError: the artifact has no such file, or the file no such tensor.
        ValueError: the tensor has another dtype or shape.
        Corrupt: as for ``read_tensors``.
    """
    file = store.file(artifact, name)
    if key not in (file.tensors or {}):
        raise KeyError(f"{artifact.key}: {name!r} has no tensor {key!r}; it has {sorted(file.tensors or {})}")
    assert file.tensors is not None, "a file that has the tensor has tensors"
    entry = file.tensors[key]
    if (entry.torch_dtype, entry.shape) != (destination.dtype, tuple(destination.shape)):
        raise ValueError(
            f"{artifact.key}: tensor {key!r} of {name!r} is {entry.dtype} of shape {entry.shape}, but the destination "
            f"is {destination.dtype} of shape {tuple(destination.shape)}. Read it with read_tensors."
        )
    into = destination if destination.device.type == "cpu" else torch.empty_like(destination, device="cpu")
    path, span = store.path(file.path), into.view(-1).view(torch.uint8).numpy().data
    with store.blaming(artifact, name):
        read_exactly(store.fs, path, entry.offset, span)
        _check(store.fs, path, key, entry, span)
    if into is not destination:
        destination.copy_(into)


def needed_bytes(entries: Mapping[str, TensorEntry]) -> int:
    """Return the size of the buffer, in bytes, that ``read_entries`` needs for these tensors."""
    return sum(_aligned(entry.nbytes) for entry in entries.values())


def read_entries(
    fs: AbstractFileSystem, path: str, entries: Mapping[str, TensorEntry], buffer: Tensor | None = None
) -> dict[str, Tensor]:
    """Read tensors of one file into a buffer; on a local disk without an intermediate copy.

    Args:
        entries: the tensors by name, in any order; those with a digest are checked.
        buffer: one-dimensional uint8 CPU tensor of at least ``needed_bytes(entries)``; a new one if None.

    Returns:
        Views on the buffer, each aligned to 64 bytes in it, in the order of ``entries``. They change when the
        buffer is reused.

    Raises:
        ValueError: the buffer is too small, or not a contiguous uint8 CPU tensor.
        Corrupt: the file is truncated, or a tensor has another digest twice in a row.
    """
    buffer = _checked_buffer(path, buffer, needed_bytes(entries))
    memory, position = buffer.numpy().data, 0
    tensors, spans = {}, {}
    for key, entry in entries.items():
        spans[key] = memory[position : position + entry.nbytes]
        flat = buffer[position : position + entry.nbytes].view(entry.torch_dtype)
        tensors[key] = flat.view(entry.shape)
        position += _aligned(entry.nbytes)
    read_scattered(fs, path, [(entries[key].offset, span) for key, span in spans.items()])
    for key, entry in entries.items():
        if entry.digest is not None:
            _check(fs, path, key, entry, spans[key])
    return tensors


def read_through(
    cache: LayerCache | None,
    fs: AbstractFileSystem,
    path: str,
    entries: Mapping[str, TensorEntry],
    buffer: Tensor,
) -> dict[str, Tensor]:
    """Read tensors of one file as ``read_entries`` does: those that ``cache`` has from there, and add the others to it.

    Args:
        cache: None for none.
        entries: the tensors by name, with digests.
    """
    if cache is None or not cache.serves(fs, path):
        return read_entries(fs, path, entries, buffer)
    found: dict[str, Tensor] = {}
    start = 0
    for key, entry in entries.items():
        flat = buffer[start : start + entry.nbytes]
        assert entry.digest is not None, "the import has computed it"
        if cache.read(entry.digest, flat.numpy().data):
            found[key] = flat.view(entry.torch_dtype).view(entry.shape)
            start += _aligned(entry.nbytes)
    missing = {key: entry for key, entry in entries.items() if key not in found}
    if missing:
        for key, tensor in read_entries(fs, path, missing, buffer[start:]).items():
            found[key] = tensor
            cache.add(str(missing[key].digest), _bytes_of(tensor))
    return {key: found[key] for key in entries}


def add_to_cache(store: ArtifactStore, file: StoredFile, tensors: Mapping[str, Tensor]) -> None:
    """Keep the tensors of a file that was just written in the store's layer cache, if it has one."""
    cache = store.layer_cache
    if cache is None or not cache.serves(store.fs, store.path(file.path)):
        return
    for key, entry in (file.tensors or {}).items():
        cache.add(str(entry.digest), _bytes_of(tensors[key]))


def _check(fs: AbstractFileSystem, path: str, key: str, entry: TensorEntry, span: memoryview) -> None:
    if xxh3_128_hexdigest(span) == entry.digest:
        return
    read_exactly(fs, path, entry.offset, span)  # bits can also flip in transit
    if (found := xxh3_128_hexdigest(span)) != entry.digest:
        raise Corrupt(
            f"{path}: tensor {key!r} has digest {found}, but {entry.digest} was recorded, twice in a row: "
            "the file was damaged or replaced. Restore it and run again. Files of a store are rebuilt by the search."
        )


def _checked_buffer(path: str, buffer: Tensor | None, needed: int) -> Tensor:
    if buffer is None:
        return torch.empty(needed, dtype=torch.uint8)
    fits = buffer.dtype == torch.uint8 and buffer.dim() == 1 and buffer.device.type == "cpu"
    if not fits or buffer.stride() != (1,) or buffer.storage_offset() % ALIGNMENT:
        raise ValueError(
            f"{path}: the buffer is a {buffer.dtype} tensor of shape {tuple(buffer.shape)}, {buffer.device}, "
            f"at {buffer.storage_offset()} in its memory. Pass a contiguous one-dimensional uint8 tensor on "
            f"the CPU that begins at a multiple of {ALIGNMENT} bytes."
        )
    if buffer.numel() < needed:
        raise ValueError(
            f"{path}: the buffer has {buffer.numel()} bytes, but these tensors need {needed}. "
            "Allocate needed_bytes(entries) of the largest group of tensors."
        )
    return buffer


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _dtype_name(file: str, key: str, tensor: Tensor) -> str:
    try:
        return dtype_name(tensor.dtype)
    except KeyError:
        raise TypeError(
            f"{file}: tensor {key!r} is {tensor.dtype}, which safetensors cannot hold. "
            f"Convert it to one of {sorted(DTYPE_NAMES)}."
        ) from None


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
