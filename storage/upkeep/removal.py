"""Deleting many files, some of which others delete at the same time, and the folders that are empty then."""

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """Something that could not be deleted, or about which it is not known whether it can be.

    Args:
        path: relative to the store's root.
        problem: why not.
    """

    path: str
    problem: str


def remove_file(path: str, remove: Callable[[], None]) -> Failure | None:
    """Call ``remove``; a file that is gone already is as good as removed."""
    try:
        remove()
    except FileNotFoundError:
        return None
    except Exception as error:  # clients raise more than OSErrors; the others are to be deleted all the same
        return Failure(path, str(error) or type(error).__name__)
    return None


def remove_empty_folders(root: str, paths: Iterable[str]) -> None:
    """Remove the folders of deleted files, and those above, as far as they are empty.

    Args:
        root: of the store, on a local disk; it stays.
        paths: of the files, relative to the root.
    """
    folders: set[str] = set()
    for path in paths:
        parts = path.split("/")[:-1]
        folders |= {"/".join(parts[:count]) for count in range(1, len(parts) + 1)}
    for folder in sorted(folders, key=lambda each: each.count("/"), reverse=True):
        with contextlib.suppress(OSError):  # not empty, or another process was first
            os.rmdir(os.path.join(root, folder))
