"""Reading from any fsspec file system: every byte that was asked for, or an error that names the range."""

import logging
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import get_filesystem_class, known_implementations

from layerwise.storage.files.corrupt import Corrupt
from layerwise.storage.files.errors import RANGE_TOO_FAR, Unreachable, endpoint_of, reaching, status_of
from layerwise.storage.files.s3 import RETRIES, patient_s3_options

logger = logging.getLogger(__name__)

PIECE = 16 << 20  # bytes of one ranged request
WINDOW = 2  # requests under way at once: 32 MB of memory beside the target, near the best rate measured
GAP = 1 << 20  # unwanted bytes between two wanted ranges that cost less than another request
BLOCK_GAP = 64 << 10  # the same where many small blocks are wanted: their requests run side by side
ATTEMPTS = 4
FIRST_DELAY = 0.2  # seconds; doubles with every attempt
PATIENCE = 60  # seconds of asking in vain after which there is no further attempt: the client repeats, too
LIMIT = 600  # seconds for one window, whatever the client's own repetitions: they can multiply to hours
# Asking again is no use after these.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, TypeError, ValueError)


def open_filesystem(url: str, **options: Any) -> tuple[AbstractFileSystem, str]:
    """The file system of ``url`` and the path of ``url`` on it.

    Options go to fsspec. Credentials come from the environment or the fsspec configuration, not from the URL.

    Raises:
        ValueError: if the protocol is unknown, or the URL holds a password.
        ImportError: if the protocol needs a package that is not installed.
    """
    url = os.fspath(url)
    if "://" in url and urlsplit(url).password:
        raise ValueError(
            f"the {urlsplit(url).scheme} URL of {urlsplit(url).hostname!r} holds a password, which would end "
            "up in logs and reports. Put credentials into environment variables or the fsspec configuration."
        )
    protocol = split_protocol(url)[0] or "file"
    _require_protocol(protocol)
    if protocol not in ("s3", "s3a"):
        return url_to_fs(url, **options)
    fs, path = url_to_fs(url, **patient_s3_options(options))
    fs.retries = max(fs.retries, RETRIES)
    return fs, path


def is_local(fs: AbstractFileSystem) -> bool:
    """Whether paths on ``fs`` are paths of this machine."""
    return isinstance(fs, LocalFileSystem)


def read_exactly(fs: AbstractFileSystem, path: str, offset: int, into: memoryview) -> None:
    """Fill ``into`` with the bytes of ``path`` from ``offset`` on.

    Raises:
        Corrupt: if the file ends before.
        Unreachable: if the storage fails, or keeps giving another number of bytes.
        OSError: as for ``reaching``.
    """
    read_scattered(fs, path, [(offset, into)])


def read_scattered(fs: AbstractFileSystem, path: str, targets: Iterable[tuple[int, memoryview]]) -> None:
    """Fill several buffers, each with the bytes of ``path`` from its offset on.

    On a local disk the kernel writes straight into the buffers. Elsewhere neighbouring ranges are fetched
    together, in pieces of 16 MB, two at a time; after a piece of the wrong length or an error it asks again.

    Args:
        targets: (offset in the file, writable buffer) in any order; the ranges must not overlap.

    Raises:
        Corrupt: if the file ends before.
        Unreachable: if the storage fails, or keeps giving another number of bytes.
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

    All requests of a remote storage are under way at once, as many as its client allows, and only blocks that
    are next to each other are fetched together: memory for all blocks and their gaps is needed.

    Args:
        blocks: by path, the (offset in the file, writable buffer) pairs; those of a file must not overlap.

    Raises:
        Corrupt: if a file ends before.
        Unreachable: if the storage fails, or keeps giving another number of bytes.
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
            while done < len(into):  # one call gives at most 2 GB
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
    """Groups of targets that lie close enough to be fetched together."""
    run: list[Target] = []
    for offset, into in targets:
        if run and offset - (run[-1][0] + len(run[-1][1])) > gap:
            yield run
            run = []
        run.append((offset, into))
    if run:
        yield run


def _pieces(run: Sequence[Target]) -> Iterator[tuple[int, int, list[Target]]]:
    """The ranges that cover a run, none longer than ``PIECE``, each with the parts of targets inside it."""
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
            # A shorter or longer body comes without any error from a faulty proxy: STORAGE.md 5.
            if isinstance(answer, Exception) or len(answer) != end - begin:
                failed.append((piece, answer))
            else:
                for offset, into in targets:
                    into[:] = memoryview(answer)[offset - begin : offset - begin + len(into)]
        if not failed:
            return
        (path, begin, end, _), answer = failed[0]
        reason = str(answer) if isinstance(answer, Exception) else f"{len(answer)} bytes came"
        if attempt == ATTEMPTS or time.monotonic() - began > PATIENCE:
            raise _lasting_failure(fs, path, (begin, end), attempt, answer) from None
        logger.warning("%s: reading bytes %d to %d failed (%s), trying again", path, begin, end, reason)
        todo = [piece for piece, _ in failed]
        time.sleep(FIRST_DELAY * 2 ** (attempt - 1) * random.uniform(0.5, 1))


def _answers(fs: AbstractFileSystem, pieces: Sequence[Piece]) -> Sequence[Any]:
    paths, begins, ends, _ = zip(*pieces, strict=True)
    # The blocking form of a coroutine, which fsspec sets on the object itself, takes a time limit.
    limit = {"timeout": LIMIT} if "cat_ranges" in vars(fs) else {}
    try:
        return fs.cat_ranges(list(paths), list(begins), list(ends), on_error="return", **limit)
    except TimeoutError as error:
        return [error] * len(pieces)


def _passing_failure(fs: AbstractFileSystem, path: str, answer: BaseException) -> Exception:
    """``answer`` as ``reaching`` tells it, if asking again can help; raises it if not."""
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
            "Restore it and run again; what lies in a store, a search builds anew."
        )
    reason = repr(answer) if isinstance(answer, Exception) else f"{len(answer)} bytes came"
    return Unreachable(
        f"bytes {begin} to {end} of {path} at {endpoint_of(fs)} could not be read in {attempts} attempts "
        f"({reason}), although the file has {size} bytes: the server, or a proxy before it, answers wrongly. "
        "Check them, then start the same command again: nothing that was committed is lost."
    )


def _require_protocol(protocol: str) -> None:
    for name in protocol.split("::"):
        try:
            get_filesystem_class(name)
        except ValueError:
            raise ValueError(
                f"no storage is known for {name}:// URLs. Use a folder, s3://, gs://, abfs://, hf:// or "
                "memory://, or install the fsspec package that brings this protocol."
            ) from None
        except ImportError as error:
            advice = known_implementations.get(name, {}).get("err", "Install the fsspec package for it")
            raise ImportError(
                f"{name}:// URLs need a package that is not installed ({error}). {advice} (pip install ...)."
            ) from error
