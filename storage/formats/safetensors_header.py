"""Headers of safetensors files: written before the data, and accepted only if the tensors fill the file exactly."""

import json
import struct
from collections.abc import Mapping

from fsspec import AbstractFileSystem

from layerwise.storage.files.errors import Corrupt, reaching
from layerwise.storage.files.reading import read_exactly
from layerwise.storage.formats.large_file_pointer import refuse_pointer
from layerwise.storage.formats.tensor_entry import TensorEntry

LENGTH = struct.Struct("<Q")  # the file begins with the length of its header
MAX_BYTES = 100_000_000  # of a header; the official reader has the same limit
FIRST_READ = 256 << 10  # bytes: one request is enough for most headers
METADATA = "__metadata__"


def read_header(fs: AbstractFileSystem, path: str) -> dict[str, TensorEntry]:
    """Return the entries of all tensors of a safetensors file, without reading tensor data.

    Returns:
        Entries by name, in the order of the data. Offsets count from the beginning of the file; there are no digests.

    Raises:
        ValueError: the file is a Git LFS pointer.
        Corrupt: the tensors do not fill the file exactly (truncated, overlapping, gaps, a size that does not match
            type and shape, an unknown type), or the header cannot be read.
    """
    with reaching(fs, path):
        size = fs.info(path)["size"]
    start = bytearray(min(size, FIRST_READ))
    read_exactly(fs, path, 0, memoryview(start))
    refuse_pointer(start, path)
    end = header_end(start, size)
    if end is None:
        length = LENGTH.unpack(start[:8])[0] if size >= 8 else MAX_BYTES + 1
        raise _damaged(path, f"of {size} bytes begins with a header length of {length}")
    if end > len(start):
        rest = bytearray(end - len(start))
        read_exactly(fs, path, len(start), memoryview(rest))
        start += rest
    return parse_header(start[:end], size, path)


def header_end(start: bytes | bytearray, size: int) -> int | None:
    """Return the offset of the data of a safetensors file; None if the file cannot be one.

    Args:
        start: at least the first 8 bytes of the file.
        size: of the file in bytes.
    """
    if len(start) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack_from(start)
    return LENGTH.size + length if length <= MAX_BYTES and LENGTH.size + length <= size else None


def parse_header(start: bytes | bytearray, size: int, path: str) -> dict[str, TensorEntry]:
    """Return the entries of all tensors that a header describes.

    Args:
        start: the file up to its data, which begin at ``header_end``.
        size: of the file in bytes.
        path: of the file, for the error message.

    Raises:
        Corrupt: as for ``read_header``.
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
    """Return the header of a safetensors file whose data follow in the given order.

    Args:
        shapes: (dtype name, shape) by tensor name.
        metadata: free text; transformers requires ``{"format": "pt"}``.

    Returns:
        The header, padded so that the data begin at a multiple of 8 bytes, and the entry of each tensor.
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
        f"{path} {finding}: it is truncated, damaged or not a safetensors file. Download or write it again."
    )
