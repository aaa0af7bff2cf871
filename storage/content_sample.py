"""Content samples: digests of files by some of their bytes, which are quick for files of any size.

Two fine-tunes of one model in a reproducible image have equal names, sizes and times, but different bytes.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fsspec import AbstractFileSystem
from xxhash import xxh3_64_intdigest, xxh3_128

from layerwise.storage.files.errors import Corrupt
from layerwise.storage.files.reading import read_blocks
from layerwise.storage.formats.safetensors_header import header_end, parse_header

WHOLE = 4 << 20  # bytes: files whose total size is not larger are read completely
HEAD = 32 << 10  # bytes from the beginning of every file: most safetensors headers completely
BLOCK = 4 << 10  # bytes: the unit that a disk reads, and 2048 weights of 16 bits
BLOCKS = 512  # in all files together: 2 MiB, which S3 delivers in a second or two
MOST_BLOCKS = 1024  # maximum where one block for every two tensors needs more than BLOCKS: 4 MiB

Span = tuple[int, int]  # begin and end in a file


@dataclass(frozen=True)
class ContentSample:
    """Digest of some bytes of a file.

    Attributes:
        digest: xxh3_128 of the offsets and values of the bytes, 32 hex digits.
        whole: whether the sample contains all bytes of the file.
    """

    digest: str
    whole: bool


def sample_contents(
    fs: AbstractFileSystem, sizes: Mapping[str, int], whole: Collection[str] = ()
) -> dict[str, ContentSample]:
    """Read a few MiB of some files, distributed so that files with different content have different digests.

    Files named in ``whole`` are read completely, and so are all files if they are small together. Otherwise the
    sample consists of

    - the head of every file: the whole header of a safetensors file, 32 KiB of any other file;
    - in safetensors files, a block of 4 KiB around every second boundary between tensors, which contains the last
      bytes of one tensor and the first bytes of the next, so that every tensor is sampled; in other files, the last
      block;
    - blocks at equal distances over the data of all files, so that there are 512 blocks in total.

    For a model of 140 GB in 723 tensors, 2 MiB and the headers are read. With more than 2048 tensors (mixtures of
    experts have 20,000), 1024 pairs of neighbours are sampled, chosen by the hash of a name: at most 4 MiB, the
    headers, and 32 KiB of each file are read. A sample can miss a small change, such as one row of an embedding;
    ``layerwise.tasks.sources.file_identity`` therefore also uses the version that the file system reports.

    Args:
        sizes: size of each file in bytes, by path.
        whole: paths of files that are read completely.

    Raises:
        Corrupt: a file is shorter than ``sizes`` says.
        OSError: as for ``read_blocks``.
    """
    sampled = {path: size for path, size in sizes.items() if path not in whole}
    if sum(sampled.values()) <= WHOLE:
        sampled = {}
    first = {path: min(size, HEAD) if path in sampled else size for path, size in sizes.items()}
    heads = {
        path: content for path, ((_, content),) in _read(fs, {p: [(0, n)] for p, n in first.items()}).items()
    }
    longer = {
        path: [(HEAD, end)]
        for path, size in sampled.items()
        if (end := header_end(heads[path], size)) is not None and end > HEAD
    }
    for path, ((_, rest),) in _read(fs, longer).items():
        heads[path] += rest
    blocks = _read(fs, _blocks(sampled, heads))
    return {
        path: ContentSample(_digest([(0, heads[path]), *blocks.get(path, [])]), path not in sampled)
        for path in sizes
    }


def _blocks(sizes: Mapping[str, int], heads: Mapping[str, bytearray]) -> dict[str, list[Span]]:
    """Return the blocks of each file to read in addition to the heads, in order and without overlaps."""
    boundaries = [
        (path, position, name)
        for path, size in sizes.items()
        for position, name in _boundaries(path, size, heads[path])
    ]
    if len(boundaries) > MOST_BLOCKS:
        boundaries.sort(key=lambda each: (xxh3_64_intdigest(each[2].encode()), each))
        del boundaries[MOST_BLOCKS:]
    wanted: dict[str, list[int]] = {path: [] for path in sizes}
    for path, position, _ in boundaries:
        wanted[path].append(position)
    rest = {path: size - len(heads[path]) for path, size in sizes.items()}
    total, count, passed = sum(rest.values()), max(0, BLOCKS - len(boundaries)), 0
    points = iter([(2 * number + 1) * total // (2 * count) for number in range(count)])
    point = next(points, total)
    for path in sizes:
        while point < passed + rest[path]:
            wanted[path].append(len(heads[path]) + point - passed)
            point = next(points, total)
        passed += rest[path]
    return {path: list(_around(wanted[path], len(heads[path]), size)) for path, size in sizes.items()}


def _boundaries(path: str, size: int, head: bytearray) -> Iterator[tuple[int, str]]:
    """Yield positions at which one block holds bytes of two neighbouring tensors, with the name of the first one."""
    end = header_end(head, size)
    if end is not None:
        try:
            tensors = parse_header(head[:end], size, path)
        except Corrupt:
            pass  # reported when its tensors are read; a file that is never read may hold anything
        else:
            names, ends = list(tensors), [*(entry.offset for entry in tensors.values()), size][1:]
            yield from zip(ends[::2], names[::2], strict=True)
            return
    yield size, ""


def _around(positions: Sequence[int], begin: int, end: int) -> Iterator[Span]:
    """Yield blocks around ``positions`` between ``begin`` and ``end``; overlapping blocks are merged."""
    open_span: Span | None = None
    for position in sorted(set(positions)):
        first = max(begin, min(position - BLOCK // 2, end - BLOCK))
        last = min(first + BLOCK, end)
        if open_span is not None and first <= open_span[1]:
            open_span = open_span[0], max(open_span[1], last)
            continue
        if open_span is not None:
            yield open_span
        open_span = (first, last) if first < last else None
    if open_span is not None:
        yield open_span


def _read(
    fs: AbstractFileSystem, spans: Mapping[str, Sequence[Span]]
) -> dict[str, list[tuple[int, bytearray]]]:
    contents = {
        path: [(begin, bytearray(end - begin)) for begin, end in each] for path, each in spans.items()
    }
    read_blocks(
        fs,
        {path: [(begin, memoryview(content)) for begin, content in each] for path, each in contents.items()},
    )
    return contents


def _digest(contents: Sequence[tuple[int, bytearray]]) -> str:
    digest = xxh3_128()
    for begin, content in contents:
        digest.update(f"{begin} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
