"""The commands of the command line and their options."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """example:
  layerwise search --model meta-llama/Llama-2-7b-hf --sparsity 0.7 --pruner wanda --store s3://bucket/prefix \\
      --calibration hf:allenai/c4 --selection hf:Salesforce/wikitext --device cuda
"""
# Options for flows that compute in this process only.
SPREADING = ["fan_out", "groups"]


def command_parser(command: Sequence[str]) -> ArgumentParser:
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
    zero_shot = commands.add_parser(
        "zero-shot", help="how the models of a finished search answer lm-eval's zero-shot tasks"
    )
    compress = commands.add_parser(
        "compress", help="the pruned checkpoint of a finished search without its zeros: smaller files"
    )
    if command == ["zero-shot"]:
        from flows.zero_shot import ZeroShot

        add_options(zero_shot, ZeroShot)
        add_options(zero_shot, Runtime, without=SPREADING)
    if command == ["compress"]:
        from flows.compress import Compress

        add_options(compress, Compress)
        add_options(compress, Runtime, without=SPREADING)
    if command == ["theory"]:
        from flows.theory import WITHOUT_OPTION, Theory

        add_options(theory, Theory, without=["search"])
        add_options(theory, Search, without=WITHOUT_OPTION)
        add_options(theory, Runtime, without=SPREADING)
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
