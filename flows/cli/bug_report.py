"""Bug report: a file with the traceback of an unexpected error, the command and the versions."""

import os
import platform
import sys
import time
import traceback
from pathlib import Path

from layerwise.storage.files.credentials import without_secrets

KEPT = 20  # reports in the folder; older ones are deleted
PACKAGES = ("layerwise-pruning", "torch", "transformers", "prefect", "pyarrow", "fsspec", "rich")


def report_folder() -> Path:
    """Return ``$XDG_STATE_HOME/layerwise``, by default ``~/.local/state/layerwise``.

    Raises:
        RuntimeError: there is no home folder.
    """
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "layerwise"


def write_report(error: BaseException) -> Path:
    """Write the traceback, the command and the versions to a file that only the user may read.

    Raises:
        OSError: the file cannot be written.
        RuntimeError: there is no home folder.
    """
    folder = report_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # In UTC: the names of the reports then sort by age.
    report = folder / f"bug-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.txt"
    facts = [
        f"command: {sys.argv}",
        f"python {platform.python_version()} on {platform.platform()}",
        *(f"{package} {_version(package)}" for package in PACKAGES),
    ]
    text = "\n".join([*facts, "", "".join(traceback.format_exception(error))])
    # Credentials must not end up in any log, including this one.
    hidden = without_secrets(text).encode("utf-8", "backslashreplace")
    with open(report, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(hidden)
    for old in sorted(folder.glob("bug-*.txt"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return report


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"
