"""Reads by byte ranges: every requested byte arrives, or an error names the range."""

import logging
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fsspec import AbstractFileSystem

from layerwise.storage.files.errors import (
    RANGE_TOO_FAR,
    Corrupt,
    Unreachable,
    endpoint_of,
    reaching,
    status_of,
)
from layerwise.storage.files.filesystem import is_local

logger = logging.getLogger(__name__)

PIECE = 16 << 20  # bytes of one ranged request
WINDOW = 2  # concurrent requests: 32 MB of memory in addition to the target, near the best rate measured
GAP = 1 << 20  # unwanted bytes between two wanted ranges that cost less than another request
BLOCK_GAP = 64 << 10  # the same for many small blocks, whose requests run concurrently
ATTEMPTS = 4
FIRST_DELAY = 0.2  # seconds; doubles with every attempt
PATIENCE = 60  # seconds of failed requests after which there is no further attempt: the client repeats, too
LIMIT = 600  # seconds for one window, including the client's own repetitions, which can add up to hours
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, TypeError, ValueError)  # never retried


def read_exactly(fs: AbstractFileSystem, path: str, offset: int, into: memoryview) -> None:
    """Fill ``into`` with the bytes of ``path``, starting at ``offset``.

    Raises:
        Corrupt: the file ends too early.
        Unreachable: the storage fails, or repeatedly answers with another number of bytes.
        OSError: as for ``reaching``.
    """
    read_scattered(fs, path, [(offset, into)])


def read_scattered(fs: AbstractFileSystem, path: str, targets: Iterable[tuple[int, memoryview]]) -> None:
    """Fill several buffers, each with the bytes of ``path`` starting at its offset.

    On a local disk the kernel writes directly into the buffers. Elsewhere neighbouring ranges are fetched
    together, in pieces of 16 MB, two at a time. A piece that fails or has the wrong length is requested again.

    Args:
        targets: (offset in the file, writable buffer) in any order; the ranges must not overlap.

    Raises:
        Corrupt: the file ends too early.
        Unreachable: the storage fails, or repeatedly answers with another number of bytes.
        OSError: as for ``reaching``.
    """
    ordered = [(offset, into.cast("B")) for offset, into in targets if into.nbytes]
    ordered.sort(key=lambda target: target[0])
    if is_local(fs):
        path = fs._strip_protocol(path)
        _read_local(path, ordered)
        return
    pieces = [(path, *piece) for run in _runs(ordered, GAP) for piece in _pieces(run)]
    for start in range(0, len(pieces), WINDOW):
        _fetch(fs, pieces[start : start + WINDOW])


def read_blocks(fs: AbstractFileSystem, blocks: Mapping[str, Sequence[tuple[int, memoryview]]]) -> None:
    """Fill many small buffers from several files; checked and retried as in ``read_scattered``.

    All requests to a remote storage run concurrently, as many as its client allows. Only blocks that are close
    to each other are fetched together. Needs memory for all blocks and their gaps.

    Args:
        blocks: by path, the (offset in the file, writable buffer) pairs; those of a file must not overlap.

    Raises:
        Corrupt: a file ends too early.
        Unreachable: the storage fails, or repeatedly answers with another number of bytes.
        OSError: as for ``reaching``.
    """
    pieces: list[Piece] = []
    for path, targets in blocks.items():
        ordered = sorted(
            ((offset, into) for offset, into in targets if into.nbytes), key=lambda each: each[0]
        )
        if is_local(fs):
            _read_local(fs._strip_protocol(path), ordered)
        else:
            pieces += [(path, *piece) for run in _runs(ordered, BLOCK_GAP) for piece in _pieces(run)]
    if pieces:
        _fetch(fs, pieces)


Target = tuple[int, memoryview]  # offset in the file, where its bytes go
Piece = tuple[str, int, int, list[Target]]  # path, begin and end in the file, the targets it fills


def _read_local(path: str, targets: Sequence[Target]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset, into in targets:
            done = 0
            while done < len(into):  # one call returns at most 2 GB
                count = os.preadv(descriptor, [into[done:]], offset + done)
                if count == 0:
                    raise Corrupt(
                        f"{path} ends at byte {offset + done}, but bytes {offset} to {offset + len(into)} "
                        "are needed: the file is truncated. Restore it and run again."
                    )
                done += count
    finally:
        os.close(descriptor)


def _runs(targets: Sequence[Target], gap: int) -> Iterator[list[Target]]:
    """Group targets that lie close enough to be fetched together."""
    run: list[Target] = []
    for offset, into in targets:
        if run and offset - (run[-1][0] + len(run[-1][1])) > gap:
            yield run
            run = []
        run.append((offset, into))
    if run:
        yield run


def _pieces(run: Sequence[Target]) -> Iterator[tuple[int, int, list[Target]]]:
    """Yield the ranges that cover a run, none longer than ``PIECE``, each with the parts of targets inside it."""
    last = run[-1][0] + len(run[-1][1])
    for begin in range(run[0][0], last, PIECE):
        end = min(begin + PIECE, last)
        inside = []
        for offset, into in run:
            part_begin, part_end = max(begin, offset), min(end, offset + len(into))
            if part_begin < part_end:
                inside.append((part_begin, into[part_begin - offset : part_end - offset]))
        if inside:
            yield begin, end, inside


def _fetch(fs: AbstractFileSystem, pieces: Sequence[Piece]) -> None:
    todo, began = list(pieces), time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        failed = []
        for piece, answer in zip(todo, _answers(fs, todo), strict=True):
            path, begin, end, targets = piece
            if isinstance(answer, BaseException):
                answer = _passing_failure(fs, path, answer)
            # A faulty proxy sends a shorter or longer body without any error.
            if isinstance(answer, Exception) or len(answer) != end - begin:
                failed.append((piece, answer))
            else:
                for offset, into in targets:
                    into[:] = memoryview(answer)[offset - begin : offset - begin + len(into)]
        if not failed:
            return
        (path, begin, end, _), answer = failed[0]
        reason = str(answer) if isinstance(answer, Exception) else f"{len(answer)} bytes arrived"
        if attempt == ATTEMPTS or time.monotonic() - began > PATIENCE:
            raise _lasting_failure(fs, path, (begin, end), attempt, answer) from None
        logger.warning("%s: reading bytes %d to %d failed (%s), trying again", path, begin, end, reason)
        todo = [piece for piece, _ in failed]
        time.sleep(FIRST_DELAY * 2 ** (attempt - 1) * random.uniform(0.5, 1))


def _answers(fs: AbstractFileSystem, pieces: Sequence[Piece]) -> Sequence[Any]:
    paths, begins, ends, _ = zip(*pieces, strict=True)
    # fsspec sets the blocking form of a coroutine on the object itself; that form accepts a time limit.
    limit = {"timeout": LIMIT} if "cat_ranges" in vars(fs) else {}
    try:
        return fs.cat_ranges(list(paths), list(begins), list(ends), on_error="return", **limit)
    except TimeoutError as error:
        return [error] * len(pieces)


def _passing_failure(fs: AbstractFileSystem, path: str, answer: BaseException) -> Exception:
    """Return ``answer`` as ``reaching`` translates it; raise it if another attempt cannot help."""
    try:
        with reaching(fs, path):
            raise answer
    except FINAL:
        raise
    except Exception as error:
        return error


def _lasting_failure(
    fs: AbstractFileSystem, path: str, span: tuple[int, int], attempts: int, answer: Any
) -> Exception:
    begin, end = span
    if isinstance(answer, Unreachable):
        return Unreachable(f"bytes {begin} to {end} of {answer}")
    if isinstance(answer, Exception) and status_of(answer) != RANGE_TOO_FAR:
        return answer
    with reaching(fs, path):
        size = fs.info(path)["size"]
    if size < end:
        return Corrupt(
            f"{path} ends at byte {size}, but bytes {begin} to {end} are needed: the file is truncated. "
            "Restore it and run again. Files of a store are rebuilt by the search."
        )
    reason = repr(answer) if isinstance(answer, Exception) else f"{len(answer)} bytes arrived"
    return Unreachable(
        f"bytes {begin} to {end} of {path} at {endpoint_of(fs)} could not be read in {attempts} attempts "
        f"({reason}), although the file has {size} bytes: the server, or a proxy in front of it, answers wrongly. "
        "Check them, then start the same command again: nothing that was committed is lost."
    )
