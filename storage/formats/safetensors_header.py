"""The header of a safetensors file: written for streaming, and believed only when its arithmetic holds."""

import json
import struct
from collections.abc import Mapping

from fsspec import AbstractFileSystem

from layerwise.storage.files.corrupt import Corrupt
from layerwise.storage.files.errors import reaching
from layerwise.storage.files.reading import read_exactly
from layerwise.storage.formats.large_file_pointer import refuse_pointer
from layerwise.storage.formats.tensor_entry import TensorEntry

LENGTH = struct.Struct("<Q")  # the file begins with the length of its header
LONGEST = 100_000_000  # bytes of a header; the official reader has the same limit
FIRST_READ = 256 << 10  # bytes: one request is enough for most headers
METADATA = "__metadata__"


def read_header(fs: AbstractFileSystem, path: str) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file, without reading tensor data.

    Returns:
        Name to entry in the order of the data, offsets counted from the beginning of the file, no digests.

    Raises:
        ValueError: if Git LFS has left a pointer in place of the file.
        Corrupt: if the tensors do not fill the file exactly: truncated, overlapping, with gaps, of another
            size than type and shape say, of an unknown type; or if the header cannot be read at all.
    """
    with reaching(fs, path):
        size = fs.info(path)["size"]
    start = bytearray(min(size, FIRST_READ))
    read_exactly(fs, path, 0, memoryview(start))
    refuse_pointer(start, path)
    end = header_end(start, size)
    if end is None:
        length = LENGTH.unpack(start[:8])[0] if size >= 8 else LONGEST + 1
        raise _damaged(path, f"of {size} bytes begins with a header length of {length}")
    if end > len(start):
        rest = bytearray(end - len(start))
        read_exactly(fs, path, len(start), memoryview(rest))
        start += rest
    return parse_header(start[:end], size, path)


def header_end(start: bytes | bytearray, size: int) -> int | None:
    """Where the data of a safetensors file begin; None for what cannot be one.

    Args:
        start: the first 8 bytes or more.
        size: of the file.
    """
    if len(start) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack_from(start)
    return LENGTH.size + length if length <= LONGEST and LENGTH.size + length <= size else None


def parse_header(start: bytes | bytearray, size: int, path: str) -> dict[str, TensorEntry]:
    """Every tensor that a header describes.

    Args:
        start: the file up to its data, whose first byte is at ``header_end``.
        size: of the file.
        path: what errors call the file.

    Raises:
        Corrupt: as ``read_header``.
    """
    try:
        header = json.loads(bytes(start[LENGTH.size :]), object_pairs_hook=_without_repeats)
        header.pop(METADATA, None)
        places = {name: _entry(tensor, len(start)) for name, tensor in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"has a header that cannot be understood: {error}") from error
    entries = dict(sorted(places.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    position = len(start)
    for name, entry in entries.items():
        if entry.offset != position:
            raise _damaged(path, f"has tensor {name!r} at byte {entry.offset}, expected at {position}")
        position += entry.nbytes
    if position != size:
        raise _damaged(path, f"has {size} bytes, but its header describes {position}")
    return entries


def encode_header(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The first bytes of a safetensors file whose data follow in the given order.

    Args:
        shapes: name to (dtype name, shape).
        metadata: free text for people and for transformers, which wants ``{"format": "pt"}``.

    Returns:
        The header, padded so that data begin at a multiple of 8 bytes, and where each tensor will lie.
    """
    relative, position = {}, 0
    for name, (dtype, shape) in shapes.items():
        relative[name] = TensorEntry(dtype, shape, position)
        position += relative[name].nbytes
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    for name, entry in relative.items():
        span = [entry.offset, entry.offset + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    entries = {name: TensorEntry(e.dtype, e.shape, begin + e.offset) for name, e in relative.items()}
    return LENGTH.pack(len(text)) + text, entries


def _entry(tensor: dict, begin: int) -> TensorEntry:
    first, last = tensor["data_offsets"]
    entry = TensorEntry(tensor["dtype"], tuple(tensor["shape"]), first)
    if last - first != entry.nbytes:
        raise ValueError(f"{last - first} bytes for a {entry.dtype} tensor of shape {list(entry.shape)}")
    return TensorEntry(entry.dtype, entry.shape, begin + first)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _damaged(path: str, finding: str) -> Corrupt:
    return Corrupt(
        f"{path} {finding}: it is truncated, damaged or no safetensors file. Download or write it again."
    )
