"""The command line: a thin door to the flows."""

import logging
import os
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from flows.embedded_server import ServerStart

EXAMPLE = """example:
  layerwise search --model meta-llama/Llama-2-7b-hf --sparsity 0.7 --pruner wanda --store s3://bucket/prefix \\
      --calibration hf:allenai/c4 --selection hf:Salesforce/wikitext --device cuda
"""


def main() -> None:
    """Entry point of the command ``layerwise``."""
    began = time.monotonic()
    _log_to_terminal()
    arguments = sys.argv[1:]
    server = ServerStart() if arguments[:1] == ["search"] and not {"-h", "--help"} & set(arguments) else None
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command == "search":
            assert server is not None, "a search that is not asked for its help starts the server"
            _search(parsed, server, began)
        else:
            {"plan": _plan, "ls": _list, "show": _show}[parsed.command](parsed)
    except KeyboardInterrupt:
        sys.exit("layerwise: stopped; nothing is lost, the same command goes on from the last resume point")
    except (ValueError, OSError, KeyError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        sys.exit(f"layerwise: {message}")
    except Exception as error:
        if not type(error).__module__.startswith(
            "botocore."
        ):  # no OSErrors: missing credentials, an unknown region
            raise
        sys.exit(
            f"layerwise: the S3 storage cannot be used ({error}). Check credentials, region and endpoint."
        )


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


def _parser() -> ArgumentParser:
    from flows.options import add_options
    from flows.settings import Runtime, Search

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
    plan = commands.add_parser("plan", help="what a search would run, and what it will take; runs nothing")
    for command in (search, plan):
        add_options(command, Search)
        add_options(command, Runtime)
    listing = commands.add_parser("ls", help="the artifacts of a store")
    listing.add_argument("store", help="Folder or fsspec URL of the store.")
    show = commands.add_parser("show", help="one artifact, or the result of a search")
    show.add_argument("store", help="Folder or fsspec URL of the store.")
    show.add_argument(
        "key", nargs="?", help="Key as ls prints it (or its beginning); the newest search if left out."
    )
    return parser


def _search(arguments: Namespace, server: ServerStart, began: float) -> None:
    from flows.options import read_options
    from flows.settings import Runtime, Search

    settings, runtime = read_options(arguments, Search), read_options(arguments, Runtime)
    from flows.search import search
    from flows.terminal import open_console, show_result

    server.wait()
    flow_began = time.monotonic()
    result = search(settings, runtime)
    flow_seconds = time.monotonic() - flow_began
    console = open_console()
    show_result(console, result)
    console.print(
        f"{time.monotonic() - began:.0f} s in all: the search {flow_seconds:.0f} s, start-up "
        f"{flow_began - began:.0f} s (Prefect's embedded server took {server.seconds:.0f} s of it)."
    )


def _plan(arguments: Namespace) -> None:
    from flows.options import read_options
    from flows.plan import plan_search
    from flows.settings import Runtime, Search
    from flows.terminal import open_console, show_plan

    show_plan(open_console(), plan_search(read_options(arguments, Search), read_options(arguments, Runtime)))


def _list(arguments: Namespace) -> None:
    from flows.terminal import open_console, show_artifacts
    from storage.store import ArtifactStore

    show_artifacts(open_console(), ArtifactStore(arguments.store).artifacts())


def _show(arguments: Namespace) -> None:
    from flows.inspect import show_key

    show_key(arguments.store, arguments.key)


if __name__ == "__main__":
    main()
