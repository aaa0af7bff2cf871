"""The command line: a thin door to the flows."""

import logging
import os
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from flows.embedded_server import ServerStart

Result = TypeVar("Result")

EXAMPLE = """example:
  layerwise search --model meta-llama/Llama-2-7b-hf --sparsity 0.7 --pruner wanda --store s3://bucket/prefix \\
      --calibration hf:allenai/c4 --selection hf:Salesforce/wikitext --device cuda
"""


def main() -> None:
    """Entry point of the command ``layerwise``."""
    began = time.monotonic()
    _log_to_terminal()
    arguments = sys.argv[1:]
    runs = arguments[:1] in (["search"], ["compare"], ["theory"]) and not {"-h", "--help"} & set(arguments)
    server = ServerStart() if runs else None
    parsed = _parser(arguments[:1]).parse_args(arguments)
    try:
        flows = {"search": _search, "compare": _compare, "theory": _theory}
        if parsed.command in flows:
            assert server is not None, "a flow that is not asked for its help starts the server"
            flows[parsed.command](parsed, server, began)
        else:
            commands = {"plan": _plan, "status": _status, "ls": _list, "show": _show, "report": _report}
            commands |= {"gc": _collect, "verify": _verify}
            commands[parsed.command](parsed)
    except KeyboardInterrupt:
        _stop("stopped by the keyboard; what was committed stays", 130)
    except (ValueError, OSError, KeyError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        sys.exit(f"layerwise: {message}")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _stop(
            f"not enough memory ({str(error).splitlines()[0]}). `layerwise plan` shows what a search needs: use fewer "
            "windows or betas, a smaller --hidden-states-gib, or another machine",
            1,
        )


def _stop(why: str, status: int) -> NoReturn:
    sys.stderr.write(f"layerwise: {why}. Resume with:\n  {shlex.join(['layerwise', *sys.argv[1:]])}\n")
    sys.exit(status)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's, CUDA's and that of torch's allocator for the CPU, which has no class of its own."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or of_torch


def _log_to_terminal() -> None:
    """Show warnings, but not what Prefect logs.

    Prefect keeps its log with the run. On the terminal there are progress, the result, or one line by ``main`` that
    says what is wrong; Prefect would add the same error twice, each time with a traceback.
    """
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    if "PREFECT_LOGGING_LEVEL" not in os.environ:  # who sets it wants to see that log
        handler.addFilter(lambda record: not record.name.startswith("prefect"))
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING, handlers=[handler])


def _parser(command: Sequence[str]) -> ArgumentParser:
    """All commands; the options of those that import transformers only if ``command`` may be one of them."""
    parser = ArgumentParser(
        prog="layerwise",
        description="Layer-wise sparsity for large language models.",
        epilog=EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    search = commands.add_parser(
        "search", help="find the best beta for a sparsity and export the pruned model"
    )
    compare = commands.add_parser(
        "compare",
        help="searches of one model with several allocators, pruners, sparsities and seeds, side by side",
    )
    theory = commands.add_parser(
        "theory", help="what the theorems of the paper say, measured on a model: numbers and a page"
    )
    plan = commands.add_parser("plan", help="what a search would run, and what it will take; runs nothing")
    if not set(command) <= {"status", "ls", "show", "report", "gc", "verify"}:
        from flows.options import add_options
        from flows.runtime import Runtime
        from flows.settings import Search

        for each in (search, plan):
            add_options(each, Search)
            add_options(each, Runtime)
    if command == ["compare"]:
        from flows.compare import Compare

        add_options(compare, Compare, without=["search"])
        add_options(compare, Search, optional=["sparsity"])
        add_options(compare, Runtime)
    if command == ["theory"]:
        from flows.theory import WITHOUT_OPTION, Theory

        add_options(theory, Theory, without=["search"])
        add_options(theory, Search, without=WITHOUT_OPTION)
        add_options(theory, Runtime, without=["fan_out", "groups"])
    status = commands.add_parser(
        "status", help="who works in a store, what was begun and not finished, which searches have ended"
    )
    status.add_argument("store", help="Folder or fsspec URL of the store.")
    listing = commands.add_parser("ls", help="the artifacts of a store")
    listing.add_argument("store", help="Folder or fsspec URL of the store.")
    show = commands.add_parser("show", help="one artifact, or the result of a search")
    show.add_argument("store", help="Folder or fsspec URL of the store.")
    show.add_argument(
        "key", nargs="?", help="Key as ls prints it (or its beginning); the newest search if left out."
    )
    report = commands.add_parser("report", help="the report of a search: one page of HTML")
    report.add_argument("store", help="Folder or fsspec URL of the store.")
    report.add_argument(
        "key", nargs="?", help="Key of a search as ls prints it (or its beginning); the newest if left out."
    )
    report.add_argument("--output", type=Path, metavar="FILE", help="Copy the page to this file.")
    collection = commands.add_parser("gc", help="what nobody can reach in a store; deletes it on request")
    collection.add_argument("store", help="Folder or fsspec URL of the store.")
    collection.add_argument("--apply", action="store_true", help="Delete it; only shown if left out.")
    collection.add_argument(
        "--results-only",
        action="store_true",
        help="Of finished searches keep the result (choice, pruned model, test), and no other artifact.",
    )
    verification = commands.add_parser("verify", help="read a whole store through; tells what is damaged")
    verification.add_argument("store", help="Folder or fsspec URL of the store.")
    verification.add_argument(
        "--set-aside",
        action="store_true",
        help="Take damaged artifacts out of use, so that the next search builds anew those it needs.",
    )
    return parser


def _search(arguments: Namespace, server: ServerStart, began: float) -> None:
    from flows.options import read_options
    from flows.runtime import Runtime
    from flows.settings import Search

    settings, runtime = read_options(arguments, Search), read_options(arguments, Runtime)
    from flows.console import open_console
    from flows.search import search
    from flows.terminal import show_result

    result, seconds = _run(lambda: search(settings, runtime), server, runtime.pool, began)
    console = open_console()
    show_result(console, result)
    console.print(seconds)


def _compare(arguments: Namespace, server: ServerStart, began: float) -> None:
    from flows.compare import Compare, compare
    from flows.compared_searches import SearchFailed
    from flows.console import open_console
    from flows.options import read_options
    from flows.runtime import Runtime
    from flows.settings import Search
    from flows.terminal import show_comparison

    if arguments.sparsity is None and arguments.sparsities:
        arguments.sparsity = arguments.sparsities.partition(",")[0]
    runtime = read_options(arguments, Runtime)
    settings = read_options(arguments, Compare, search=read_options(arguments, Search))
    try:
        results, seconds = _run(lambda: compare(settings, runtime), server, runtime.pool, began)
    except SearchFailed as failure:
        sys.exit(f"layerwise: {failure}")
    console = open_console()
    show_comparison(console, results)
    console.print(seconds)


def _theory(arguments: Namespace, server: ServerStart, began: float) -> None:
    from flows.console import open_console
    from flows.options import read_options
    from flows.runtime import Runtime
    from flows.settings import Search
    from flows.terminal import show_theory
    from flows.theory import Theory, theory

    runtime = read_options(arguments, Runtime)
    settings = read_options(arguments, Theory, search=read_options(arguments, Search))
    result, seconds = _run(lambda: theory(settings, runtime), server, None, began)
    console = open_console()
    show_theory(console, result)
    console.print(seconds)


def _run(
    run: Callable[[], Result], server: ServerStart, pool: str | None, began: float
) -> tuple[Result, str]:
    """Run a flow to its end, or end with what resumes it.

    Returns:
        What the flow returns, and a line on what took how long.
    """
    from prefect.exceptions import CancelledRun

    from flows.step import StepFailed
    from tasks.stopping import TerminationSignal, stopping_on_sigterm

    try:
        with stopping_on_sigterm():  # the flow's own begins later and ends earlier
            server.wait()
            flow_began = time.monotonic()
            result = run()
    except TerminationSignal:
        after = (
            f"what runs on the work pool {pool!r} goes on by itself"
            if pool
            else "nothing that was finished is lost"
        )
        _stop(f"stopped by SIGTERM; {after}", 143)
    except CancelledRun as cancelled:
        _stop(str(cancelled), 1)
    except StepFailed as failure:
        sys.exit(f"layerwise: {failure}")
    flow_seconds = time.monotonic() - flow_began
    return result, (
        f"{time.monotonic() - began:.0f} s in all: the search {flow_seconds:.0f} s, start-up "
        f"{flow_began - began:.0f} s (Prefect's embedded server took {server.seconds:.0f} s of it)."
    )


def _plan(arguments: Namespace) -> None:
    from flows.console import open_console
    from flows.options import read_options
    from flows.plan import plan_search
    from flows.runtime import Runtime
    from flows.settings import Search
    from flows.terminal import show_plan

    show_plan(open_console(), plan_search(read_options(arguments, Search), read_options(arguments, Runtime)))


def _status(arguments: Namespace) -> None:
    from flows.status import show_status

    show_status(arguments.store)


def _list(arguments: Namespace) -> None:
    from flows.console import open_console
    from flows.terminal import show_artifacts
    from storage.store import ArtifactStore

    show_artifacts(open_console(), ArtifactStore(arguments.store).artifacts())


def _show(arguments: Namespace) -> None:
    from flows.inspect import show_key

    show_key(arguments.store, arguments.key)


def _report(arguments: Namespace) -> None:
    from flows.console import open_console
    from flows.report import make_report

    open_console().print(make_report(arguments.store, arguments.key, arguments.output), soft_wrap=True)


def _collect(arguments: Namespace) -> None:
    from flows.housekeeping import collect_garbage

    sys.exit(collect_garbage(arguments.store, arguments.apply, arguments.results_only))


def _verify(arguments: Namespace) -> None:
    from flows.housekeeping import verify_store

    sys.exit(verify_store(arguments.store, arguments.set_aside))


if __name__ == "__main__":
    main()
