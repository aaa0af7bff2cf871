"""The commands of the command line and their options."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from layerwise.sparse.speed_settings import SpeedSettings

EXAMPLE = """example:
  layerwise search --model meta-llama/Llama-2-7b-hf --sparsity 0.7 --pruner wanda --store s3://bucket/prefix \\
      --calibration hf:allenai/c4 --selection hf:Salesforce/wikitext --device cuda
"""
# In the order of the help.
WITH_SETTINGS = {
    "search": "find the best beta for a sparsity and export the pruned model",
    "compare": "searches of one model with several allocators, pruners, sparsities and seeds, side by side",
    "theory": "what the theorems of the paper say, measured on a model: numbers and a page",
    "plan": "what a search would run, and what it will take; runs nothing",
    "zero-shot": "how the models of a finished search answer lm-eval's zero-shot tasks",
    "compress": "the pruned checkpoint of a finished search without its zeros: smaller files",
}
ON_STORES = {
    "status": "who works in a store, what was begun and not finished, which searches have ended",
    "ls": "the artifacts of a store",
    "show": "one artifact, or the result of a search",
    "report": "the report of a search: one page of HTML",
    "gc": "what nobody can reach in a store; deletes it on request",
    "verify": "read a whole store through; tells what is damaged",
}
BENCH = "how fast a checkpoint runs on this machine's CPU, dense and with packed weights"
# Options that some flows do not have: those that compute in this process only, and those that end by themselves.
SPREADING = ["fan_out", "groups"]
LIMITING = ["minutes"]


def command_parser(command: Sequence[str]) -> ArgumentParser:
    """All commands; the options of those that import transformers only if ``command`` may be one of them."""
    parser = ArgumentParser(
        prog="layerwise",
        description="Layer-wise sparsity for large language models.",
        epilog=EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=what) for name, what in (WITH_SETTINGS | ON_STORES).items()
    }
    for name in ON_STORES:
        _add_arguments_of_a_store(parsers[name], name)
    _add_arguments_of_bench(commands.add_parser("bench", help=BENCH))
    if command and command[0] in WITH_SETTINGS:
        _add_settings(parsers[command[0]], command[0])
    return parser


def _add_settings(parser: ArgumentParser, command: str) -> None:
    """One option for every setting of a flow."""
    from flows.options import add_options
    from flows.runtime import Runtime
    from flows.settings import Search

    if command == "compare":
        from flows.compare import Compare

        add_options(parser, Compare, without=["search"])
        add_options(parser, Search, optional=["sparsity"])
    elif command == "theory":
        from flows.theory import WITHOUT_OPTION, Theory

        add_options(parser, Theory, without=["search"])
        add_options(parser, Search, without=WITHOUT_OPTION)
    elif command == "zero-shot":
        from flows.zero_shot import ZeroShot

        add_options(parser, ZeroShot)
    elif command == "compress":
        from flows.compress import Compress

        add_options(parser, Compress)
    else:
        add_options(parser, Search)
    without = [] if command in ("search", "plan") else LIMITING
    if command not in ("search", "plan", "compare"):
        without = without + SPREADING
    add_options(parser, Runtime, without=without)


def _add_arguments_of_bench(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="Folder of a checkpoint, with its zeros or compressed; or the store of a finished search.",
    )
    parser.add_argument(
        "key", nargs="?", help="Key of a search in the store (or its beginning); the newest if left out."
    )
    usual = SpeedSettings()
    for name, default, what in (
        ("prompt-tokens", usual.prompt_tokens, "Tokens of the random prompt that is read at once."),
        ("new-tokens", usual.new_tokens, "Tokens that are written after it, one at a time."),
        ("rounds", usual.rounds, "How often every way is run, in turns."),
    ):
        metavar = name.rpartition("-")[2].upper()
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar=metavar, help=f"{what} Default: {default}."
        )


def _add_arguments_of_a_store(parser: ArgumentParser, command: str) -> None:
    parser.add_argument("store", help="Folder or fsspec URL of the store.")
    if command == "show":
        parser.add_argument(
            "key", nargs="?", help="Key as ls prints it (or its beginning); the newest search if left out."
        )
    if command == "report":
        parser.add_argument(
            "key",
            nargs="?",
            help="Key of a search as ls prints it (or its beginning); the newest if left out.",
        )
        parser.add_argument("--output", type=Path, metavar="FILE", help="Copy the page to this file.")
    if command == "gc":
        parser.add_argument("--apply", action="store_true", help="Delete it; only shown if left out.")
        parser.add_argument(
            "--results-only",
            action="store_true",
            help="Of finished searches keep the result (choice, pruned model, test), and no other artifact.",
        )
    if command == "verify":
        parser.add_argument(
            "--set-aside",
            action="store_true",
            help="Take damaged artifacts out of use, so that the next search builds anew those it needs.",
        )
