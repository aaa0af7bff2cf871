"""Reads by byte ranges: every requested byte arrives, or an error names the range."""

import asyncio
import logging
import os
import random
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import count, islice
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

PIECE = 8 << 20  # maximum bytes of one ranged request
SMALLEST = 1 << 20  # bytes of a request that is made smaller so that all requests of a read run at once
WINDOW = 32  # requests under way at once: with PIECE, 256 MB of memory in addition to the target
# Reading in order, pieces that arrive early wait for slower ones before them: more and smaller ones, in the same memory.
ORDERED_PIECE = 4 << 20
ORDERED_HELD = 64  # pieces under way or waiting
LONE_PIECE = 16 << 20  # maximum bytes of a request to a client that makes one request at a time
READ_MEMORY = WINDOW * PIECE  # bytes
GAP = 1 << 20  # unwanted bytes between two wanted ranges that cost less than another request
BLOCK_GAP = 64 << 10  # the same for many small blocks, whose requests run concurrently
ATTEMPTS = 4
FIRST_DELAY = 0.2  # seconds; doubles with every attempt
PATIENCE = 60  # seconds of failed requests after which there is no further attempt: the client repeats, too
LIMIT = 600  # seconds for one request, including the client's own repetitions, which can add up to hours
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
    together, in pieces of at most 8 MB, up to 32 at once: the next request starts when one ends. Clients that cannot
    do this (``hf://``) fetch 16 MB at a time. A piece that fails or has the wrong length is requested again.

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
    runs = list(_runs(ordered, GAP))
    size = _even_piece(fs, sum(_end(run) - run[0][0] for run in runs))
    _fill(fs, [(path, *piece) for run in runs for piece in _pieces(run, size)])


def read_ahead(
    fs: AbstractFileSystem, ranges: Sequence[tuple[str, int, int]]
) -> Generator[memoryview, None, None]:
    """Yield the bytes of several ranges in order, in pieces of at most 4 MB, while the next pieces are being read.

    Up to 32 requests to a remote storage run at once, and 256 MB are under way or in memory. On a local disk the kernel
    reads the next piece in the background. Checked and retried as in ``read_scattered``. Closing the iterator early
    cancels the requests.

    Args:
        ranges: path, offset in the file, and number of bytes of each range.

    Yields:
        The next piece, in memory that is overwritten when the following one is requested. No piece spans two ranges.

    Raises:
        Corrupt: a file ends too early.
        Unreachable: the storage fails, or repeatedly answers with another number of bytes.
        OSError: as for ``reaching``.
    """
    pieces: Iterator[Piece] = (
        (path, begin, min(begin + ORDERED_PIECE, offset + size), [])
        for path, offset, size in ranges
        for begin in range(offset, offset + size, ORDERED_PIECE)
    )
    buffer = memoryview(bytearray(min(ORDERED_PIECE, max((size for _, _, size in ranges), default=0))))
    if not is_local(fs):
        for (_, begin, end, _), answer in _fetched(fs, pieces, in_order=True):
            buffer[: end - begin] = answer
            yield buffer[: end - begin]
        return
    piece = next(pieces, None)
    while piece is not None:
        path, begin, end, _ = piece
        _read_local(fs._strip_protocol(path), [(begin, buffer[: end - begin])])
        if (piece := next(pieces, None)) is not None:
            _read_later(fs._strip_protocol(piece[0]), *piece[1:3])
        yield buffer[: end - begin]


def read_blocks(fs: AbstractFileSystem, blocks: Mapping[str, Sequence[tuple[int, memoryview]]]) -> None:
    """Fill many small buffers from several files; checked and retried as in ``read_scattered``.

    Up to 32 requests to a remote storage run at once. Only blocks that are close to each other are fetched together.

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
            pieces += [(path, *piece) for run in _runs(ordered, BLOCK_GAP) for piece in _pieces(run, PIECE)]
    _fill(fs, pieces)


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


def _read_later(path: str, begin: int, end: int) -> None:
    """Ask the kernel to read a range in the background."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
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


def _end(run: Sequence[Target]) -> int:
    """Return the offset in the file at which a run ends."""
    offset, into = run[-1]
    return offset + len(into)


def _even_piece(fs: AbstractFileSystem, total: int) -> int:
    """Return the size of the pieces of a read of ``total`` bytes.

    A read ends with its last request. So the number of pieces is a multiple of the requests that run at once, and none
    of them is left over for a round of its own.
    """
    if not _is_concurrent(fs):
        return LONE_PIECE
    rounds = max(1, -(-total // (WINDOW * PIECE)))
    return min(PIECE, max(SMALLEST, -(-total // (WINDOW * rounds))))


def _pieces(run: Sequence[Target], size: int) -> Iterator[tuple[int, int, list[Target]]]:
    """Yield the ranges that cover a run, none longer than ``size``, each with the parts of targets inside it."""
    last = _end(run)
    for begin in range(run[0][0], last, size):
        end = min(begin + size, last)
        inside = []
        for offset, into in run:
            part_begin, part_end = max(begin, offset), min(end, offset + len(into))
            if part_begin < part_end:
                inside.append((part_begin, into[part_begin - offset : part_end - offset]))
        if inside:
            yield begin, end, inside


def _fill(fs: AbstractFileSystem, pieces: Sequence[Piece]) -> None:
    """Fetch pieces, and write each of them into its targets."""
    for (_, begin, _, targets), answer in _fetched(fs, pieces, in_order=False):
        for offset, into in targets:
            into[:] = memoryview(answer)[offset - begin : offset - begin + len(into)]


def _fetched(
    fs: AbstractFileSystem, pieces: Iterable[Piece], in_order: bool
) -> Iterator[tuple[Piece, bytes]]:
    """Yield each piece with its bytes. While the caller works on one, the requests for the next ones are under way.

    Holds ``WINDOW`` pieces, or ``ORDERED_HELD`` in order, in addition to the one that the caller works on. If a piece
    fails, or the caller closes the iterator, the other requests are cancelled.

    Args:
        in_order: yield the pieces in their order; otherwise as they arrive, so that a slow one delays no other.
    """
    window, held = WINDOW, ORDERED_HELD if in_order else WINDOW
    if not _is_concurrent(fs):
        window = held = 1
    todo = iter(pieces)
    requests: dict[Future[bytes], tuple[Piece, float]] = {}
    try:
        while True:
            under_way = [request for request in requests if not request.done()]
            for piece in islice(todo, min(window - len(under_way), held - len(requests))):
                request = _request(fs, piece)
                requests[request] = piece, time.monotonic()
                under_way.append(request)
            if not requests:
                return
            next_ones = islice(requests, 1) if in_order else requests
            ready = next((request for request in next_ones if request.done()), None)
            if ready is None:
                wait(under_way, return_when=FIRST_COMPLETED)
                continue
            piece, began = requests.pop(ready)
            yield piece, _received(fs, piece, ready, began)
    finally:
        for request in requests:
            request.cancel()


def _is_concurrent(fs: AbstractFileSystem) -> bool:
    """Return whether several requests of this client can run at once."""
    return "cat_ranges" in vars(fs)  # fsspec sets the blocking form of a coroutine on the object itself


def _request(fs: AbstractFileSystem, piece: Piece) -> Future[bytes]:
    """Begin to fetch a piece; a client that makes one request at a time fetches it now."""
    path, begin, end, _ = piece
    if _is_concurrent(fs):
        fetching = asyncio.wait_for(fs._cat_file(path, start=begin, end=end), LIMIT)
        return asyncio.run_coroutine_threadsafe(fetching, fs.loop)
    future: Future[bytes] = Future()
    try:
        future.set_result(fs.cat_file(path, begin, end))
    except Exception as error:
        future.set_exception(error)
    return future


def _received(fs: AbstractFileSystem, piece: Piece, request: Future[bytes], began: float) -> bytes:
    """Return the bytes of a piece; if the answer is wrong, request them again.

    Args:
        began: when the request was made, by ``time.monotonic``.
    """
    path, begin, end, _ = piece
    for attempt in count(1):
        answer: Any = _result(request)
        failed = isinstance(answer, Exception)
        if failed:
            answer = _passing_failure(fs, path, answer)
        elif len(answer) == end - begin:  # a faulty proxy sends a shorter or longer body without any error
            return answer
        # Slow requests with a wrong length do not count against the patience: the client did not repeat them.
        if attempt == ATTEMPTS or (failed and time.monotonic() - began > PATIENCE):
            raise _lasting_failure(fs, path, (begin, end), attempt, answer) from None
        reason = str(answer) if failed else f"{len(answer)} bytes arrived"
        logger.warning("%s: reading bytes %d to %d failed (%s), trying again", path, begin, end, reason)
        time.sleep(FIRST_DELAY * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        request = _request(fs, piece)
    raise AssertionError("the last attempt returns or raises")


def _result(request: Future[bytes]) -> bytes | Exception:
    try:
        return request.result()
    except Exception as error:
        return error


def _passing_failure(fs: AbstractFileSystem, path: str, answer: Exception) -> Exception:
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
