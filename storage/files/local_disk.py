"""Files on a local disk: complete or absent, even after a power failure or on a full disk."""

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from layerwise.storage.files.errors import Removed

Made = TypeVar("Made")

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
REMOVALS = 20  # maximum number of times that other processes remove a folder between its creation and use
GO_ON = "then start the same command again: it continues from its last resume point."


def replace_file(path: str, pieces: Iterable[memoryview]) -> None:
    """Write a file, replacing an existing one.

    Raises:
        Removed: another process deleted the unfinished file.
        OSError: the disk is full or refuses; the old file, if any, is unchanged.
    """
    temporary = _write_temporary(path, pieces)
    try:
        with explaining_refusals(path):
            _put_in_place(temporary, path, os.replace)
    except BaseException:
        _remove(temporary)
        raise
    with contextlib.suppress(FileNotFoundError):  # another process removed the file and its folder
        _sync_directory(os.path.dirname(path))


def create_file(path: str, document: bytes) -> bool:
    """Write a file unless it exists. Exactly one of several callers gets True.

    Raises:
        Removed: another process deleted the unfinished file.
        OSError: the disk is full, refuses, or has no hard links.
    """
    temporary = _write_temporary(path, [memoryview(document)])
    try:
        with explaining_refusals(path):
            _put_in_place(temporary, path, _link)
    except FileExistsError:
        return False
    finally:
        _remove(temporary)
    _sync_directory(os.path.dirname(path))
    return True


def link_file(source: str, target: str) -> None:
    """Make ``target`` a second name of the file ``source``, and set its modification time to now.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        OSError: ``target`` exists, or the disk refuses or has no hard links.
    """
    with explaining_refusals(target):
        os.utime(source)  # for both names: garbage collection must see that a process is at work here
        _in_its_folder(target, lambda: _link(source, target))
    _sync_directory(os.path.dirname(target))


def drop_from_cache(path: str, offset: int, length: int) -> None:
    """Remove a range of a file from the system's cache, so that the next read comes from the disk."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explaining_refusals(path: str, written: int = 0, wanted: int = 0) -> Iterator[None]:
    """Within the block, replace errors of a full or read-only disk by errors with sizes and advice.

    Args:
        written: bytes of the file that are on the disk already.
        wanted: bytes that the block adds; 0 if it adds no content.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            problem = f"its disk or quota is full ({error.strerror}). {_free_space(path)}"
            problem += f"; {wanted} more bytes are needed after {written}." if wanted else "."
            advice = f"Free space, {GO_ON}"
        elif error.errno in REFUSED:
            problem = f"the user with id {os.getuid()} is not allowed to ({error.strerror})."
            advice = f"Mount the disk writable, or change the owner or mode of the folder, {GO_ON}"
        else:
            raise
        raise OSError(error.errno, f"{path} cannot be written: {problem} {advice}") from error


def _write_temporary(path: str, pieces: Iterable[memoryview]) -> str:
    """Write a temporary file in the folder of ``path``: a rename is atomic only on the same disk."""
    temporary, written = f"{path}.{uuid.uuid4().hex}.tmp", 0
    with explaining_refusals(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = _in_its_folder(temporary, lambda: os.open(temporary, flags, 0o666))
    try:
        for piece in pieces:  # outside of explaining_refusals: the pieces may come from another disk
            rest = piece
            while rest:  # a disk that is nearly full accepts only a part
                with explaining_refusals(path, written, len(rest)):
                    count = os.write(descriptor, rest)
                rest, written = rest[count:], written + count
        with explaining_refusals(path, written):
            os.fsync(descriptor)
    except BaseException:
        _remove(temporary)
        raise
    finally:
        os.close(descriptor)
    return temporary


def _put_in_place(temporary: str, path: str, put: Callable[[str, str], None]) -> None:
    try:
        put(temporary, path)
    except FileNotFoundError as error:
        raise Removed(path) from error


def _in_its_folder(path: str, make: Callable[[], Made]) -> Made:
    """Create the folders of ``path``, then call ``make``, which creates the file."""
    for _ in range(REMOVALS):
        # Another process may remove the folder while it is empty.
        with contextlib.suppress(FileNotFoundError):
            _make_directory(os.path.dirname(path))
            return make()
    raise FileNotFoundError(
        errno.ENOENT,
        f"{path} cannot be written: its folder was removed {REMOVALS} times while the file was being created. "
        f"Stop the process that removes it, {GO_ON}",
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)  # fails if target exists; a rename would replace it
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        raise OSError(
            errno.ENOTSUP,
            f"{target} cannot be created exclusively: this file system has no hard links ({error.strerror}). "
            "Put the store on a local disk, a network disk with hard links, or object storage.",
        ) from error


def _make_directory(path: str) -> None:
    """Create a folder and its parents so that they survive a power failure."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_directory(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    _sync_directory(parent)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(temporary: str) -> None:
    with contextlib.suppress(OSError):  # the first error is the one to report
        os.unlink(temporary)


def _free_space(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    disk = os.statvfs(path)
    return f"{disk.f_bavail * disk.f_frsize} bytes and {disk.f_favail} files are free on it"
