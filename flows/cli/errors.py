"""Error messages of the command line: one line with what to do; for a bug, also where the traceback is."""

import dis
import sys
import traceback
from types import FrameType, TracebackType

from layerwise.flows.cli.bug_report import write_report
from layerwise.storage.files.credentials import without_secrets
from layerwise.tasks.running.printable import one_line, printable

# Packages that meet the user's files, storage and network. Their errors are about those; some derive from Exception.
LIBRARIES = {
    "_lzma",
    "aiobotocore",
    "aiohttp",
    "binascii",
    "botocore",
    "fsspec",
    "gzip",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "json",
    "lm_eval",
    "optuna",
    "prefect",
    "pyarrow",
    "safetensors",
    "safetensors_rust",
    "sqlalchemy",
    "sqlite3",
    "tarfile",
    "yaml",
    "zipfile",
    "zlib",
}
OUR_PACKAGE = "layerwise"


def explain(error: BaseException, debug: bool) -> str:
    """One line about ``error``; what nobody expected is kept in a report, which the line names.

    Args:
        debug: print the traceback on stderr first.
    """
    if debug:
        for line in "".join(traceback.format_exception(error)).rstrip("\n").split("\n"):
            sys.stderr.write(f"{printable(without_secrets(line))}\n")
    if is_expected(error):
        return without_secrets(_message(error))
    said = f"{type(error).__name__}: {one_line(without_secrets(str(error)))}{_place(error)}"
    return f"this is a bug in layerwise: {said}. {_what_to_do(error, debug)}"


def is_expected(error: BaseException) -> bool:
    """Whether an error is about what the user has given or has not: the input, a file, the network, a package.

    It is, if a line of code raised it as a ``ValueError``, ``KeyError`` or ``ImportError``; if the system or a library
    for files and networks raised it. It is not, if the interpreter found a mistake in our code: a missing key, text
    that is no number.
    """
    if isinstance(error, OSError | ImportError | UnicodeError) or _library(error) is not None:
        return True
    if isinstance(error, RecursionError):  # JSON of others that is nested too deeply
        return _module(_innermost(error)).startswith("json.")
    if isinstance(error, ValueError | KeyError):
        return _is_raised_on_purpose(error)
    return type(error) is Exception  # the extensions in Rust, such as that of tokenizers, have nothing else


def _message(error: BaseException) -> str:
    """The text of an expected error; of a library's also whose it is, as it may name no file and no option."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, RecursionError):
        return "JSON is nested too deeply to be read. Check the files that the command reads (--debug shows where)."
    if _is_ours(error) and text:
        return text
    kind = type(error).__name__
    return f"{text.rstrip('. ') or kind} ({kind}; --debug shows where)"


def _library(error: BaseException) -> str | None:
    """The library that defines the class of ``error``, or one that it derives from."""
    names = (each.__module__.partition(".")[0] for each in type(error).__mro__)
    return next((name for name in names if name in LIBRARIES), None)


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it, and chose the words."""
    if error.__traceback__ is None:
        return True
    return _package(_innermost(error)) == OUR_PACKAGE and _is_raised_on_purpose(error)


def _is_raised_on_purpose(error: BaseException) -> bool:
    """Whether a statement ``raise`` did it, and not the interpreter or an extension."""
    trace = _last(error.__traceback__)
    if trace is None:
        return True
    instruction = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    return dis.opname[instruction] == "RAISE_VARARGS"


def _innermost(error: BaseException) -> FrameType:
    trace = _last(error.__traceback__)
    assert trace is not None, "an error that was caught has been raised"
    return trace.tb_frame


def _last(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _place(error: BaseException) -> str:
    """The last line of our own code that the error passed."""
    frames = traceback.walk_tb(error.__traceback__)
    ours = [(_module(frame), line) for frame, line in frames if _package(frame) == OUR_PACKAGE]
    return f" (in {ours[-1][0]}, line {ours[-1][1]})" if ours else ""


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _package(frame: FrameType) -> str:
    return _module(frame).partition(".")[0]


def _what_to_do(error: BaseException, debug: bool) -> str:
    try:
        report = write_report(error)
    except (OSError, RuntimeError) as problem:
        shown = "shown above" if debug else "shown with --debug"
        return (
            f"The traceback is {shown}; it could not be written to a file ({problem}). Please report the bug with the "
            "traceback and the command."
        )
    return (
        f"The traceback is in {report}; please report the bug to the maintainers with this file and what you did. "
        "--debug shows it here."
    )
