"""Digests of files by their content that stay quick for files of any size.

Names, sizes and times are equal for two fine-tunes of one model in a reproducible image; bytes are not.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fsspec import AbstractFileSystem
from xxhash import xxh3_64_intdigest, xxh3_128

from layerwise.storage.files.corrupt import Corrupt
from layerwise.storage.files.reading import read_blocks
from layerwise.storage.formats.safetensors_header import header_end, parse_header

WHOLE = 4 << 20  # bytes: files that have no more than this together are read whole
HEAD = 32 << 10  # bytes from the beginning of every file: all of most safetensors headers
BLOCK = 4 << 10  # bytes: what a disk reads at once, and 2048 weights of 16 bits
BLOCKS = 512  # of all files together: 2 MiB, in a second or two from S3
MOST_BLOCKS = 1024  # where one for every two tensors needs more than BLOCKS: 4 MiB

Span = tuple[int, int]  # begin and end in a file


@dataclass(frozen=True)
class ContentSample:
    """Digest of some bytes of a file.

    Attributes:
        digest: xxh3_128 of their places and values, 32 hex digits.
        whole: whether they are all bytes of the file.
    """

    digest: str
    whole: bool


def sample_contents(
    fs: AbstractFileSystem, sizes: Mapping[str, int], whole: Collection[str] = ()
) -> dict[str, ContentSample]:
    """Read a few MiB of some files, spread so that files with other content give other digests.

    Read whole are the files named in ``whole``, and all if they are small together. Of others:

    - the head: of a safetensors file its whole header, of others 32 KiB;
    - of safetensors files a block of 4 KiB around every second boundary between tensors, which holds the last
      bytes of one tensor and the first of the next, so that every tensor is looked at; of other files the last
      block;
    - blocks at equal distances over the data of all files, so that there are 512 blocks in all.

    A model of 140 GB in 723 tensors costs 2 MiB and its headers. Beyond 2048 tensors (mixtures of experts have
    20,000) 1024 pairs of neighbours are looked at, chosen by the hash of a name: never more than 4 MiB, the
    headers, and 32 KiB of each file are read. What a sample misses, such as one changed row of an embedding, the
    file system's own version has to tell: see ``layerwise.tasks.sources.file_identity``.

    Args:
        sizes: bytes of each file, by path.
        whole: paths of files whose every byte matters.

    Raises:
        Corrupt: if a file is shorter than ``sizes`` says.
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
    """Which blocks of each file to read, apart from the heads, in order and apart from each other."""
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
    """Positions at which one block holds bytes of two neighbouring tensors, with the name of the first one."""
    end = header_end(head, size)
    if end is not None:
        try:
            tensors = parse_header(head[:end], size, path)
        except Corrupt:
            pass  # told when its tensors are asked for; a file that nobody asks for may be anything
        else:
            names, ends = list(tensors), [*(entry.offset for entry in tensors.values()), size][1:]
            yield from zip(ends[::2], names[::2], strict=True)
            return
    yield size, ""


def _around(positions: Sequence[int], begin: int, end: int) -> Iterator[Span]:
    """Blocks around ``positions`` that lie between ``begin`` and ``end``, overlapping ones united."""
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
