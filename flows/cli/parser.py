"""The commands of the command line and their options."""

from argparse import SUPPRESS, Action, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from layerwise.sparse.speed_settings import SpeedSettings
from layerwise.tasks.running.printable import one_line

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
DEBUG = "Show the traceback of an error. Use it to report a bug."
BENCH = "how fast a checkpoint runs on this machine's CPU, dense and with packed weights"


class CommandParser(ArgumentParser):
    """A parser whose errors are one line, and which names the option that a misspelt one is nearest to."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args is not None and self._subparsers is None:
            # Before what is required is looked for: who misspelt an option must not read that it is missing.
            self._refuse_unknown_options(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            option = message.removeprefix("argument ").partition(":")[0].split("/")[-1]
            message += f". A value that begins with a dash needs an equals sign: {option}=-0.1"
        end = "" if message.endswith("?") else "."
        self.exit(2, f"{self.prog}: {one_line(message)}{end} See `{self.prog} --help`.\n")

    def _refuse_unknown_options(self, arguments: Sequence[str]) -> None:
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for argument in arguments:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                self.error(f"unknown option {name}{_nearest(name, known)}")


class ShowVersion(Action):
    """Print the version of the package and end; it is looked up only if it is asked for."""

    def __call__(self, parser: ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"layerwise {version('layerwise-pruning')}")
        parser.exit()


def parse_command(arguments: Sequence[str]) -> Namespace:
    """The command and its options; without arguments the help is printed, which is no error.

    Raises:
        SystemExit: what is not valid is named on stderr; also after the help and the version.
    """
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = command_parser([] if command is None else [command])
    if not arguments:
        parser.print_help()
        parser.exit()
    commands = [*WITH_SETTINGS, *ON_STORES, "bench"]
    if command is None and not {"-h", "--help", "--version"} & set(arguments):
        parser.error(f"a command is missing: one of {', '.join(commands)}")
    if command is not None and command not in commands:
        parser.error(f"unknown command {command!r}{_nearest(command, commands)}")
    parsed, left = parser.parse_known_args(arguments)
    if left:
        parser.error(f"unexpected argument {left[0]!r}; quote a value that holds spaces")
    return parsed


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def command_parser(command: Sequence[str]) -> ArgumentParser:
    """All commands; the options of those that import transformers only if ``command`` may be one of them."""
    parser = CommandParser(
        prog="layerwise",
        description="Layer-wise sparsity for large language models.",
        epilog=EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="Show the version and exit.")
    parser.add_argument("--debug", action="store_true", help=DEBUG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=what) for name, what in (WITH_SETTINGS | ON_STORES).items()
    }
    for name in ON_STORES:
        _add_arguments_of_a_store(parsers[name], name)
    parsers["bench"] = commands.add_parser("bench", help=BENCH)
    _add_arguments_of_bench(parsers["bench"])
    for each in parsers.values():
        # Not given here it must not overwrite what was given before the command.
        each.add_argument("--debug", action="store_true", default=SUPPRESS, help=DEBUG)
    if command and command[0] in WITH_SETTINGS:
        _add_settings(parsers[command[0]], command[0])
    return parser


def _add_settings(parser: ArgumentParser, command: str) -> None:
    """One option for every setting of a flow."""
    from layerwise.flows.options import add_options
    from layerwise.flows.runtime import FanOutRuntime, Runtime, SearchRuntime
    from layerwise.flows.settings import Search

    if command == "compare":
        from layerwise.flows.compare import Compare

        add_options(parser, Compare, without=["search"])
        add_options(parser, Search, optional=["sparsity"])
    elif command == "theory":
        from layerwise.flows.theory import WITHOUT_OPTION, Theory

        add_options(parser, Theory, without=["search"])
        add_options(parser, Search, without=WITHOUT_OPTION)
    elif command == "zero-shot":
        from layerwise.flows.zero_shot import ZeroShot

        add_options(parser, ZeroShot)
    elif command == "compress":
        from layerwise.flows.compress import Compress

        add_options(parser, Compress)
    else:
        add_options(parser, Search)
    runtime = {"search": SearchRuntime, "plan": SearchRuntime, "compare": FanOutRuntime}.get(command, Runtime)
    add_options(parser, runtime, group="runtime")


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
