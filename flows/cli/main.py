"""Entry point of the command ``layerwise``: log to the terminal, run one command, report its errors."""

import logging
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from layerwise.flows.cli.errors import explain, fail, stop
from layerwise.flows.cli.flow_commands import (
    run_compare,
    run_compress,
    run_distill,
    run_generate_calibration,
    run_search,
    run_theory,
    run_work,
    run_zero_shot,
)
from layerwise.flows.cli.parser import parse_command
from layerwise.tasks.running import log_lines
from layerwise.tasks.running.printable import one_line

FLOWS = {
    "search": run_search,
    "compare": run_compare,
    "zero-shot": run_zero_shot,
    "compress": run_compress,
    "distill": run_distill,
    "generate-calibration": run_generate_calibration,
    "theory": run_theory,
    "work": run_work,
}


def main() -> None:
    """Run the command that ``sys.argv`` names, and exit with its status."""
    began = time.monotonic()
    debug = "--debug" in sys.argv  # before the options are parsed, because parsing may fail as well
    # A name that the terminal cannot encode must not end the command. stderr escapes such names by default.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    _log_to_terminal(debug)
    threading.excepthook = lambda thread: _report_thread_error(thread, debug)
    try:
        parsed = parse_command(sys.argv[1:])
        log_lines.formatter.log_format = parsed.log_format
        if parsed.command in FLOWS:
            with _exiting_on(parsed.on_signal):
                FLOWS[parsed.command](parsed, began)
        else:
            commands = {"plan": _plan, "status": _status, "ls": _list, "show": _show, "report": _report}
            commands |= {"gc": _collect, "verify": _verify, "bench": _bench, "doctor": _doctor}
            commands[parsed.command](parsed)
    except KeyboardInterrupt:
        stop("interrupted; finished stages and resume points are kept", 130)
    except Exception as error:  # the outermost frame: every error is reported here
        if not _is_out_of_memory(error):
            fail(explain(error, debug))
        stop(
            f"not enough memory ({str(error).splitlines()[0]}). `layerwise plan` shows how much a search needs. Use "
            "fewer windows or betas, a smaller --hidden-states-gib, or another machine",
            1,
        )
    finally:
        _flush()


@contextmanager
def _exiting_on(name: str | None) -> Iterator[None]:
    """Exit with status 143 on a signal that arrives before or after the run, which handles it itself.

    Args:
        name: value of --on-signal.
    """
    if name is None:
        yield
        return
    number = signal.Signals[f"SIG{name}"]
    kept = "finished stages and resume points are kept"
    signal.signal(number, lambda *_: stop(f"stopped by {number.name}; {kept}", 143))
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_IGN)  # the status of the command is known


def _flush() -> None:
    """Flush stdout, whose reader may have ended, as in ``layerwise ls STORE | head -1``."""
    if sys.stdout is None:  # the parent process closed it, as with ``>&-``
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_thread_error(thread: threading.ExceptHookArgs, debug: bool) -> None:
    if thread.exc_value is not None and thread.exc_type is not SystemExit:
        logging.getLogger("layerwise").error(
            "in the background: %s", one_line(explain(thread.exc_value, debug))
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether Python, CUDA or torch on the CPU ran out of memory; the last has no error class of its own."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or of_torch


def _log_to_terminal(debug: bool) -> None:
    """Show warnings, but neither Prefect's log nor the progress bars of other packages.

    Prefect keeps its log with the run. The terminal shows progress, and the result or one line from ``main`` about an
    error; Prefect would print the same error twice more, each time with a traceback.
    """
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    log_lines.formatter.debug = debug
    handler.setFormatter(log_lines.formatter)
    if "PREFECT_LOGGING_LEVEL" not in os.environ:  # a user who sets it wants to see that log
        handler.addFilter(lambda record: not record.name.startswith("prefect"))
        # After its server has ended, Prefect would log an error for every event that it cannot send.
        os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "CRITICAL")
    # Read when tqdm is imported; the only way to hide lm-eval's bars.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns if a model is not given by name
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _plan(arguments: Namespace) -> None:
    from layerwise.flows.cli.console import open_console, waiting

    measure = not arguments.no_measure
    with waiting("planning, and measuring this machine" if measure else "planning"):
        from layerwise.flows.cli.tables import show_plan
        from layerwise.flows.options import read_options
        from layerwise.flows.plan import plan_search
        from layerwise.flows.runtime import SearchRuntime
        from layerwise.flows.settings import Search

        settings, runtime = read_options(arguments, Search), read_options(arguments, SearchRuntime)
        plan = plan_search(settings, runtime, measure=measure)
    show_plan(open_console(), plan)


def _status(arguments: Namespace) -> None:
    from layerwise.flows.cli.status import show_status

    show_status(arguments.store)


def _list(arguments: Namespace) -> None:
    from layerwise.flows.cli.ls import list_artifacts

    list_artifacts(arguments.store)


def _show(arguments: Namespace) -> None:
    from layerwise.flows.cli.show import show_key

    show_key(arguments.store, arguments.key)


def _report(arguments: Namespace) -> None:
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.report import make_report

    open_console().print(make_report(arguments.store, arguments.key, arguments.output), soft_wrap=True)


def _bench(arguments: Namespace) -> None:
    from layerwise.flows.bench import bench
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.cli.tables import show_speed
    from layerwise.sparse.speed_settings import SpeedSettings

    settings = SpeedSettings(arguments.prompt_tokens, arguments.new_tokens, arguments.rounds)
    show_speed(open_console(), *bench(arguments.model, arguments.key, settings))


def _doctor(arguments: Namespace) -> None:
    from layerwise.flows.cli.doctor import examine

    sys.exit(examine(arguments.store, arguments.model, arguments.debug))


def _collect(arguments: Namespace) -> None:
    from layerwise.flows.cli.store_commands import collect_garbage

    sys.exit(collect_garbage(arguments.store, arguments.apply, arguments.results_only))


def _verify(arguments: Namespace) -> None:
    from layerwise.flows.cli.store_commands import verify_store

    sys.exit(verify_store(arguments.store, arguments.set_aside))
