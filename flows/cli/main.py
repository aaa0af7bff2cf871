"""The command line: a thin door to the flows."""

import logging
import os
import sys
import threading
import time
from argparse import Namespace
from io import TextIOWrapper

from layerwise.flows.cli.errors import explain
from layerwise.flows.cli.flow_commands import run_compare, run_compress, run_search, run_theory, run_zero_shot
from layerwise.flows.cli.parser import parse_command
from layerwise.flows.cli.resume_hint import fail, stop
from layerwise.tasks.running.printable import one_line, printable

FLOWS = {
    "search": run_search,
    "compare": run_compare,
    "zero-shot": run_zero_shot,
    "compress": run_compress,
    "theory": run_theory,
}


def main() -> None:
    """Entry point of the command ``layerwise``."""
    began = time.monotonic()
    debug = "--debug" in sys.argv  # before the options are parsed, which may fail, too
    # A name that this terminal cannot show must not end the command. stderr is like that by itself.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    _log_to_terminal(debug)
    threading.excepthook = lambda thread: _say_error_of_thread(thread, debug)
    try:
        parsed = parse_command(sys.argv[1:])
        if parsed.command in FLOWS:
            FLOWS[parsed.command](parsed, began)
        else:
            commands = {"plan": _plan, "status": _status, "ls": _list, "show": _show, "report": _report}
            commands |= {"gc": _collect, "verify": _verify, "bench": _bench}
            commands[parsed.command](parsed)
    except KeyboardInterrupt:
        stop("stopped by the keyboard; what was committed stays", 130)
    except Exception as error:  # the outermost frame: every error is said here, and none is lost
        if not _is_out_of_memory(error):
            fail(explain(error, debug))
        stop(
            f"not enough memory ({str(error).splitlines()[0]}). `layerwise plan` shows what a search needs: use fewer "
            "windows or betas, a smaller --hidden-states-gib, or another machine",
            1,
        )
    finally:
        _flush()


def _flush() -> None:
    """Write what is left for stdout; nobody may read it any more, as in ``layerwise ls STORE | head -1``."""
    if sys.stdout is None:  # closed by whoever started this process, as by ``>&-``
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_error_of_thread(thread: threading.ExceptHookArgs, debug: bool) -> None:
    if thread.exc_value is not None and thread.exc_type is not SystemExit:
        sys.stderr.write(f"layerwise: in the background: {one_line(explain(thread.exc_value, debug))}\n")


def _is_out_of_memory(error: Exception) -> bool:
    """Python's, CUDA's and that of torch's allocator for the CPU, which has no class of its own."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or of_torch


class LineFormatter(logging.Formatter):
    """A log record in printable lines; of an error that it carries one line, and the traceback only to debug."""

    def __init__(self, debug: bool) -> None:
        super().__init__("%(levelname)s %(message)s")
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        if self._debug:
            text = super().format(record)
        else:
            record.message = record.getMessage()
            text = self.formatMessage(record)
            if record.exc_info and record.exc_info[1] is not None:
                text += f" ({type(record.exc_info[1]).__name__}: {record.exc_info[1]})"
        # Further lines are indented: no name can begin a line of its own.
        return "\n  ".join(map(printable, text.split("\n")))


def _log_to_terminal(debug: bool) -> None:
    """Show warnings, but neither what Prefect logs nor the bars of other packages.

    Prefect keeps its log with the run. On the terminal there are progress, the result, or one line by ``main`` that
    says what is wrong; Prefect would add the same error twice, each time with a traceback.
    """
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(LineFormatter(debug))
    if "PREFECT_LOGGING_LEVEL" not in os.environ:  # who sets it wants to see that log
        handler.addFilter(lambda record: not record.name.startswith("prefect"))
        # Of a server that has ended during a run Prefect says so again for every event that it cannot send.
        os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; lm-eval's bars know no other way
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is no name of one
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _plan(arguments: Namespace) -> None:
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.cli.tables import show_plan
    from layerwise.flows.options import read_options
    from layerwise.flows.plan import plan_search
    from layerwise.flows.runtime import SearchRuntime
    from layerwise.flows.settings import Search

    show_plan(
        open_console(), plan_search(read_options(arguments, Search), read_options(arguments, SearchRuntime))
    )


def _status(arguments: Namespace) -> None:
    from layerwise.flows.cli.status import show_status

    show_status(arguments.store)


def _list(arguments: Namespace) -> None:
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.cli.tables import show_artifacts
    from layerwise.storage.existing_store import existing_store

    show_artifacts(open_console(), existing_store(arguments.store).artifacts())


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


def _collect(arguments: Namespace) -> None:
    from layerwise.flows.cli.store_commands import collect_garbage

    sys.exit(collect_garbage(arguments.store, arguments.apply, arguments.results_only))


def _verify(arguments: Namespace) -> None:
    from layerwise.flows.cli.store_commands import verify_store

    sys.exit(verify_store(arguments.store, arguments.set_aside))


if __name__ == "__main__":
    main()
