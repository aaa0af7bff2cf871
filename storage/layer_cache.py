"""Cache of a checkpoint's tensors on a local disk, for stores and source folders that are slower to read."""

import contextlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from fsspec import AbstractFileSystem
from xxhash import xxh3_128_hexdigest

from layerwise.storage.files.filesystem import is_local

logger = logging.getLogger(__name__)

SHARE_OF_DISK = 0.9  # of the free space at the start, if no size is given
TEMPORARY = ".part"
OWN_FILE = re.compile(rf"[0-9a-f]{{32}}({re.escape(TEMPORARY)})?")  # all other files are left alone
ABANDONED = 24 * 3600  # seconds after which a temporary file belongs to a process that has died
SCAN_INTERVAL = 10  # seconds between looks at what other processes have added


class LayerCache:
    """Tensors by the digest of their bytes, one file each. Several processes may use one folder.

    When the cache is full, it deletes tensors that this process has not used, the least recently used first, and then
    keeps no more: every pass reads the layers in the same order, so replacing layers by later ones would leave nothing
    for the next pass. After an error of the disk, the cache is not used any more: tensors are read from their source.

    Args:
        folder: created if it does not exist.
        size: maximum size in bytes; None for 90 % of the disk's free space, including what the cache has already.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, size: int | None = None) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f"{uuid.uuid4().hex}{TEMPORARY}"
            probe.touch()  # an error now, instead of at the first layer
            probe.unlink()
        except OSError as error:
            raise OSError(
                error.errno,
                f"the layer cache {folder} cannot be written ({error.strerror}). Give a folder on a local disk that you "
                "may write to, or leave the layer cache out.",
            ) from error
        self._device = folder.stat().st_dev
        self._used: set[str] = set()  # digests of tensors that this process has read or added
        self._is_full_said = self._has_failed = False
        self._scanned = 0.0
        # Last use, size and path of tensors that may be deleted.
        self._others: list[tuple[float, int, Path]] = []
        self._kept = self._scan()
        free = shutil.disk_usage(folder).free
        self.size = int(SHARE_OF_DISK * (free + self._kept)) if size is None else size

    def serves(self, fs: AbstractFileSystem, path: str) -> bool:
        """Return whether a file of tensors is worth caching: not if it is on the same disk as the cache."""
        if self._has_failed:
            return False
        if not is_local(fs):
            return True
        return os.stat(fs._strip_protocol(path)).st_dev != self._device

    def read(self, digest: str, into: memoryview) -> bool:
        """Fill ``into`` with the tensor of this digest; return False if the cache does not have it.

        A damaged tensor is deleted.
        """
        path = self.folder / digest
        try:
            with path.open("rb", buffering=0) as file:
                done = 0
                while done < len(into) and (count := file.readinto(into[done:])):
                    done += count
            if done < len(into) or xxh3_128_hexdigest(into) != digest:
                logger.warning("%s is damaged; it is deleted, and the tensor is read from its source", path)
                path.unlink(missing_ok=True)
                return False
        except FileNotFoundError:
            return False
        except OSError as error:
            self._fail(error)
            return False
        self._used.add(digest)
        with contextlib.suppress(OSError):  # deleted by another process, or owned by another user
            os.utime(path)
        return True

    def add(self, digest: str, content: memoryview) -> None:
        """Keep a tensor, if there is room."""
        with self.receiving(len(content)) as arriving:
            arriving.write(content)
            arriving.keep(digest)

    @contextlib.contextmanager
    def receiving(self, nbytes: int) -> Iterator["Arriving"]:
        """Yield a file for a tensor of ``nbytes`` whose digest is not known yet. It is dropped unless it is kept."""
        arriving = Arriving()
        try:
            if not self._has_failed and self._has_room(nbytes):
                arriving.open(self.folder)
        except OSError as error:
            self._fail(error)
        try:
            yield arriving
        finally:
            arriving.close()
        if arriving.error is not None:
            self._fail(arriving.error)
        if arriving.kept is not None:
            self._kept += nbytes
            self._used.add(arriving.kept)

    def _fail(self, error: OSError) -> None:
        """Stop using the cache: the source has everything."""
        if not self._has_failed:
            logger.warning(
                "the layer cache %s is not used any more (%s); layers are read from their source",
                self.folder,
                error,
            )
        self._has_failed = True

    def _has_room(self, nbytes: int) -> bool:
        if time.monotonic() - self._scanned > SCAN_INTERVAL:
            self._kept = self._scan()
        if self._kept + nbytes > self.size and nbytes <= self.size:
            self._make_room(nbytes)
        if self._kept + nbytes <= self.size:
            return True
        if not self._is_full_said:
            logger.info("the layer cache %s is full; further layers are read from their source", self.folder)
            self._is_full_said = True
        return False

    def _make_room(self, nbytes: int) -> None:
        """Delete tensors that this process has not used, until ``nbytes`` fit or none is left."""
        self._kept = self._scan()
        for _, size, path in sorted(self._others):
            if self._kept + nbytes <= self.size:
                return
            path.unlink(missing_ok=True)
            self._kept -= size

    def _scan(self) -> int:
        """Return the size of the kept tensors in bytes; note those that may be deleted, and delete abandoned files."""
        kept, self._others, self._scanned = 0, [], time.monotonic()
        for entry in os.scandir(self.folder):
            if not OWN_FILE.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted by another process
                found = entry.stat()
                if not entry.name.endswith(TEMPORARY):
                    kept += found.st_size
                    if entry.name not in self._used:
                        self._others.append((found.st_mtime, found.st_size, Path(entry.path)))
                elif time.time() - found.st_mtime > ABANDONED:
                    os.unlink(entry.path)
        return kept


class Arriving:
    """A tensor on its way into the cache. An error of the disk drops it.

    Attributes:
        kept: its digest, once it is kept.
        error: the error that dropped it; None if there was none.
    """

    def __init__(self) -> None:
        self.kept: str | None = None
        self.error: OSError | None = None
        self._file: FileIO | None = None

    def open(self, folder: Path) -> None:
        """Begin a file; without it, nothing is kept."""
        self._file = (folder / f"{uuid.uuid4().hex}{TEMPORARY}").open("xb", buffering=0)

    def write(self, piece: memoryview) -> None:
        """Append bytes."""
        rest = piece
        while rest and self._file is not None:  # a disk that is nearly full accepts only a part
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as error:
                self._drop(error)

    def keep(self, digest: str) -> None:
        """Keep the tensor under the digest of all bytes written."""
        if self._file is None:
            return
        path = Path(self._file.name)
        try:
            path.rename(path.with_name(digest))
            self._file.close()
        except OSError as error:
            self._drop(error)
        else:
            self._file, self.kept = None, digest

    def close(self) -> None:
        """Drop the tensor unless it was kept."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            Path(self._file.name).unlink(missing_ok=True)
        self._file = None

    def _drop(self, error: OSError) -> None:
        self.error = error
        self.close()
