"""End a command that cannot continue: one line that says what to do, and a bug report for an unexpected error."""

import dis
import logging
import shlex
import sys
import traceback
from types import FrameType, TracebackType
from typing import NoReturn

from layerwise.flows.cli.bug_report import write_report
from layerwise.storage.files.credentials import without_secrets
from layerwise.tasks.running.log_lines import is_json, log_to_run, write_line
from layerwise.tasks.running.printable import one_line, printable

# Packages that work on files, storages and networks. Their errors are about the user's input or environment, not about
# our code. Some of these errors derive directly from Exception.
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


def fail(message: str, status: int = 1) -> NoReturn:
    """Print one line on stderr, and exit."""
    if is_json():
        _write_json(message, exit_status=status)
    else:
        sys.stderr.write(f"layerwise: {one_line(message)}\n")
    sys.exit(status)


def stop(message: str, status: int) -> NoReturn:
    """Print one line on stderr and the command that resumes the work, and exit."""
    command = without_secrets(printable(shlex.join(["layerwise", *sys.argv[1:]])))
    if is_json():
        _write_json(message, exit_status=status, command=command)
    else:
        sys.stderr.write(f"layerwise: {one_line(message)}. Resume with:\n  {command}\n")
    sys.exit(status)


def _write_json(message: str, **details: object) -> None:
    write_line(log_to_run(one_line(message), details, logging.ERROR))


def explain(error: BaseException, debug: bool) -> str:
    """Describe ``error`` in one line. An unexpected error is written to a bug report, whose path is in the line.

    Args:
        debug: print the traceback on stderr first.
    """
    if debug:
        trace = without_secrets("".join(traceback.format_exception(error)).rstrip("\n"))
        if is_json():
            write_line(log_to_run(trace, level=logging.ERROR))
        else:
            sys.stderr.writelines(f"{printable(line)}\n" for line in trace.split("\n"))
    if is_expected(error):
        return without_secrets(_message(error))
    said = f"{type(error).__name__}: {one_line(without_secrets(str(error)))}{_last_own_line(error)}"
    return f"this is a bug in layerwise: {said}. {_what_to_do(error, debug)}"


def is_expected(error: BaseException) -> bool:
    """Return whether an error is about the user's input or environment: options, files, network, packages.

    This holds for a ``ValueError`` or ``KeyError`` that a ``raise`` statement raised, and for every error of imports,
    of the operating system and of ``LIBRARIES``. An error that the interpreter raised, such as a missing key or
    ``int("x")``, is a bug in our code.
    """
    if isinstance(error, OSError | ImportError | UnicodeError) or _library(error) is not None:
        return True
    if isinstance(error, RecursionError):  # JSON of the user that is nested too deeply
        return _module(_innermost(error)).startswith("json.")
    if isinstance(error, ValueError | KeyError):
        return _is_raised_on_purpose(error)
    return type(error) is Exception  # extensions in Rust, such as tokenizers, raise nothing else


def _message(error: BaseException) -> str:
    """Return the text of an expected error. The class is added to a library's text, which may lack the context."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, RecursionError):
        return "JSON is nested too deeply to be read. Check the files that the command reads (--debug shows where)."
    if _is_ours(error) and text:
        return text
    kind = type(error).__name__
    return f"{text.rstrip('. ') or kind} ({kind}; --debug shows where)"


def _library(error: BaseException) -> str | None:
    """Return the library that defines the class of ``error`` or one of its base classes."""
    names = (each.__module__.partition(".")[0] for each in type(error).__mro__)
    return next((name for name in names if name in LIBRARIES), None)


def _is_ours(error: BaseException) -> bool:
    """Return whether our own code raised ``error``, and therefore wrote its text."""
    if error.__traceback__ is None:
        return True
    return _package(_innermost(error)) == OUR_PACKAGE and _is_raised_on_purpose(error)


def _is_raised_on_purpose(error: BaseException) -> bool:
    """Return whether a ``raise`` statement raised ``error``, and not the interpreter or an extension."""
    trace = _last(error.__traceback__)
    if trace is None:
        return True
    instruction = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    return dis.opname[instruction] == "RAISE_VARARGS"


def _innermost(error: BaseException) -> FrameType:
    trace = _last(error.__traceback__)
    assert trace is not None, "an error that was caught has a traceback"
    return trace.tb_frame


def _last(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _last_own_line(error: BaseException) -> str:
    """Return the last line of our own code in the traceback, in parentheses; "" if there is none."""
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
        f"The traceback is in {report}. Please report the bug to the maintainers: attach this file and describe what "
        "you did. --debug prints the traceback here."
    )
