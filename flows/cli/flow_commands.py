"""Commands that run a flow: read its settings from the options, run it, print its result."""

import shlex
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from layerwise.flows.cli.errors import fail, stop
from layerwise.flows.orchestration.embedded_server import ServerStart
from layerwise.tasks.running.log_lines import log_to_run, write_line
from layerwise.tasks.running.printable import printable

if TYPE_CHECKING:  # imports Prefect
    from layerwise.flows.compare import Compare

Result = TypeVar("Result")


def run_search(arguments: Namespace, began: float) -> None:
    from layerwise.flows.options import read_options
    from layerwise.flows.pipeline.time_limit import check_minutes
    from layerwise.flows.runtime import SearchRuntime
    from layerwise.flows.settings import Search

    settings, runtime = read_options(arguments, Search), read_options(arguments, SearchRuntime)
    check_minutes(settings, runtime)
    server = ServerStart()  # after the options are checked; it starts while the rest is imported
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.cli.tables import show_result
    from layerwise.flows.search import search

    result, seconds = run_flow(lambda: search(settings, runtime), server, arguments, began, runtime.continues)
    console = open_console()
    show_result(console, result)
    console.print(seconds)


def run_compare(arguments: Namespace, began: float) -> None:
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.cli.tables import show_comparison
    from layerwise.flows.compare import SearchFailed, compare
    from layerwise.flows.options import read_options
    from layerwise.flows.presets.atp_paper import preset_notes
    from layerwise.flows.runtime import FanOutRuntime

    runtime, settings = read_options(arguments, FanOutRuntime), comparison_of(arguments)
    server = ServerStart()
    try:
        results, seconds = run_flow(
            lambda: compare(settings, runtime), server, arguments, began, runtime.continues
        )
    except SearchFailed as failure:
        fail(str(failure))
    console = open_console()
    show_comparison(console, results)
    for note in preset_notes(settings.table) if settings.preset else ():
        console.print(f"- {note}", soft_wrap=True, highlight=False, markup=False)
    console.print(seconds)


def comparison_of(arguments: Namespace) -> "Compare":
    """Return the settings of a comparison: the given options, and those of the preset for the others.

    Raises:
        ValueError: an option is not valid; see ``read_options``.
    """
    from layerwise.flows.compare import Compare
    from layerwise.flows.options import parsed, read_options
    from layerwise.flows.presets.atp_paper import preset_options
    from layerwise.flows.settings import Search

    if arguments.preset is not None:
        given = [name for name, value in vars(arguments).items() if value is not None]
        for name, text in preset_options(arguments.preset, arguments.table, given).items():
            setattr(arguments, name, text)
    if arguments.sparsity is None and arguments.sparsities:
        arguments.sparsity = arguments.sparsities.partition(",")[0]
    windows = None
    if arguments.recover is None and arguments.recoveries:
        # They are for the recoveries in the list; the common search alone would refuse them.
        windows, arguments.recover_windows = arguments.recover_windows, None
    search = read_options(arguments, Search)
    compared = read_options(arguments, Compare, search=search)
    if windows is None:
        return compared
    common: dict[str, object] = {name: getattr(search, name) for name in search.model_fields_set}
    common["recover_windows"] = parsed("recover_windows", windows)
    return read_options(arguments, Compare, search=common)


def run_theory(arguments: Namespace, began: float) -> None:
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.cli.tables import show_theory
    from layerwise.flows.options import read_options
    from layerwise.flows.runtime import Runtime
    from layerwise.flows.settings import Search
    from layerwise.flows.theory import Theory, theory

    runtime = read_options(arguments, Runtime)
    settings = read_options(arguments, Theory, search=read_options(arguments, Search))
    server = ServerStart()
    result, seconds = run_flow(lambda: theory(settings, runtime), server, arguments, began)
    console = open_console()
    show_theory(console, result)
    console.print(seconds)


def run_zero_shot(arguments: Namespace, began: float) -> None:
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.cli.tables import show_rows
    from layerwise.flows.options import read_options
    from layerwise.flows.runtime import Runtime
    from layerwise.flows.zero_shot import ZeroShot, zero_shot
    from layerwise.storage.existing_store import existing_store
    from layerwise.tasks.lm_eval_tasks.comparison import comparison_rows, in_two_tables

    settings, runtime = read_options(arguments, ZeroShot), read_options(arguments, Runtime)
    existing_store(runtime.store)  # raises before the server is waited for
    server = ServerStart()
    comparison, seconds = run_flow(lambda: zero_shot(settings, runtime), server, arguments, began)
    console = open_console()
    accuracies, differences = in_two_tables(comparison_rows(comparison))
    show_rows(console, accuracies, left=("task",))
    console.print()
    console.print("Differences in percentage points, in brackets the p-value of McNemar's test:")
    show_rows(console, differences, left=("task",))
    console.print(seconds)


def run_compress(arguments: Namespace, began: float) -> None:
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.cli.tables import show_compressed
    from layerwise.flows.compress import Compress, compress
    from layerwise.flows.options import read_options
    from layerwise.flows.runtime import Runtime
    from layerwise.storage.existing_store import existing_store

    settings, runtime = read_options(arguments, Compress), read_options(arguments, Runtime)
    store = existing_store(runtime.store)  # raises before the server is waited for
    server = ServerStart()
    folder, seconds = run_flow(lambda: compress(settings, runtime), server, arguments, began)
    console = open_console()
    show_compressed(console, folder, store.location(folder))
    console.print(seconds)


def run_distill(arguments: Namespace, began: float) -> None:
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.cli.tables import show_distilled
    from layerwise.flows.distill import Distill, distill
    from layerwise.flows.options import read_options
    from layerwise.flows.runtime import Runtime
    from layerwise.storage.existing_store import existing_store
    from layerwise.tasks.results.distillation import read_distillation

    settings, runtime = read_options(arguments, Distill), read_options(arguments, Runtime)
    store = existing_store(runtime.store)  # raises before the server is waited for
    server = ServerStart()
    folder, seconds = run_flow(lambda: distill(settings, runtime), server, arguments, began)
    console = open_console()
    show_distilled(console, read_distillation(store, folder), store.location(folder))
    console.print(seconds)


def run_generate_calibration(arguments: Namespace, began: float) -> None:
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.generate_calibration import GenerateCalibration, generate_calibration
    from layerwise.flows.options import read_options
    from layerwise.flows.runtime import Runtime
    from layerwise.tasks.generation.generate_calibration import TEXT_FILE

    settings, runtime = read_options(arguments, GenerateCalibration), read_options(arguments, Runtime)
    server = ServerStart()
    artifact, seconds = run_flow(lambda: generate_calibration(settings, runtime), server, arguments, began)
    console = open_console()
    location = runtime.open_store().location(artifact, TEXT_FILE)
    console.print(f"{artifact.facts['responses']} responses: {location}", soft_wrap=True)
    console.print(f"  layerwise search --calibration {shlex.quote(location)} ...", soft_wrap=True)
    console.print(seconds)


def run_work(arguments: Namespace, began: float) -> None:
    from layerwise.flows.cli.console import open_console
    from layerwise.flows.options import read_options
    from layerwise.flows.runtime import WorkerRuntime

    runtime = read_options(arguments, WorkerRuntime)
    from layerwise.flows.fan_out.worker import work

    server = (
        ServerStart()
    )  # after the imports: nobody waits for the seconds that importing meanwhile would save

    def say(line: str) -> None:
        write_line(log_to_run(printable(line)))

    done, seconds = run_flow(lambda: work(runtime, say), server, arguments, began)
    console = open_console()
    parts = "1 part of a search" if done == 1 else f"{done} parts of searches"
    console.print(f"Ran {parts} in {runtime.store}.", soft_wrap=True)
    console.print(seconds)


def run_flow(
    run: Callable[[], Result], server: ServerStart, arguments: Namespace, began: float, continues: str = ""
) -> tuple[Result, str]:
    """Run a flow. If it does not finish, exit with a message and the command that resumes it.

    Args:
        arguments: options of the command; ``on_signal`` is read here.
        began: start of the command, on the clock ``time.monotonic``.
        continues: what continues after this process was stopped; empty for the usual text.

    Returns:
        The result of the flow, and a line with the times.
    """
    import httpx
    from prefect.exceptions import CancelledRun

    from layerwise.flows.fan_out.part import PartFailed
    from layerwise.flows.orchestration.server_check import is_about_server, server_problem
    from layerwise.flows.runtime import KEPT
    from layerwise.tasks.running.stopping import TerminationSignal, stopping_on_sigterm

    also = None if arguments.on_signal is None else signal.Signals[f"SIG{arguments.on_signal}"]
    try:
        with stopping_on_sigterm(also):  # the flow defers SIGTERM too, but begins later and ends earlier
            server.wait()
            flow_began = time.monotonic()
            result = run()
    except TerminationSignal as stopped:
        stop(f"stopped by {signal.Signals(stopped.signal).name}; {continues or KEPT}", 143)
    except CancelledRun as cancelled:
        stop(str(cancelled), 1)
    except PartFailed as failure:
        fail(str(failure))
    except httpx.HTTPError as error:
        if not is_about_server(error):
            raise
        fail(server_problem(error))
    server_name = "Prefect's embedded server" if server.embedded else "reaching your Prefect server"
    flow_seconds = time.monotonic() - flow_began
    return result, (
        f"{time.monotonic() - began:.0f} s in all: the run {flow_seconds:.0f} s, start-up "
        f"{flow_began - began:.0f} s ({server_name} took {server.seconds:.0f} s of it)."
    )
