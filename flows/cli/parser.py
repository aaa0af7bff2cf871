"""Parser of the command line: the commands and their options."""

from argparse import SUPPRESS, Action, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from layerwise.sparse.speed_settings import SpeedSettings
from layerwise.tasks.running.printable import one_line

EXAMPLE = """example:
  layerwise search --model meta-llama/Llama-2-7b-hf --sparsity 0.7 --pruner wanda --store s3://bucket/prefix \\
      --calibration c4 --selection wikitext2 --device cuda
"""
# In the order of the help.
WITH_SETTINGS = {
    "search": "find the best beta for a sparsity, and export the pruned model",
    "compare": "search one model with several allocators, pruners, sparsities and seeds, and compare the results",
    "theory": "measure the theorems of the ATP paper on a model: numbers and a page",
    "plan": "show what a search would run and need, without running it",
    "zero-shot": "test the models of a finished search on lm-eval's zero-shot tasks",
    "compress": "write the pruned or the distilled checkpoint of a finished search without its zeros: smaller files",
    "generate-calibration": "let the dense model write a text to calibrate on, as answers to prompts",
    "distill": "train the weights that a finished search kept towards the dense model: lower perplexity",
    "work": "run parts of the searches of a store that are started with --fan-out store",
}
ON_STORES = {
    "status": "show running processes, unfinished stages and finished searches of a store",
    "ls": "list the artifacts of a store",
    "show": "show one artifact, or the result of a search",
    "report": "make the report of a search: one HTML page",
    "gc": "show unreferenced files in a store, and delete them with --apply",
    "verify": "read every file of a store, and show the damaged ones",
}
SIGNALS = ("USR1", "USR2")
ON_SIGNAL = (
    "Treat this signal like SIGTERM: write a resume point at the next layer, and exit with status 143. For SLURM's "
    "--signal=B:USR1@SECONDS. One of USR1, USR2."
)
DEBUG = "Show the traceback of an error, for a bug report."
LOG_FORMATS = ("text", "json")
LOG_FORMAT = (
    "Format of progress, warnings and errors on standard error. text: lines for people, with a progress bar on a terminal. json: "
    "one JSON object per line (time, level, stage, message, and numbers such as layer, layers, seconds_left). Default: text."
)
NO_MEASURE = "Do not measure this machine: show no times. Measuring reads up to 256 MB of the model, and takes about 5 seconds."
BENCH = "measure the speed of a checkpoint on this machine's CPU, dense and with packed weights"
DOCTOR = "show what this machine has, what that means for a model, and what is wrong with the set-up"
STORE = "Folder or fsspec URL (s3://bucket/prefix) of the store."
NEWEST_SEARCH = "Key of a search or its beginning, as ls prints it. Default: the newest search."


class CommandParser(ArgumentParser):
    """Parser whose errors are one line, with the option that is closest to a misspelt one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args is not None and self._subparsers is None:
            # Before required options are checked: a misspelt option must not be reported as a missing one.
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
    """Print the version of the package, and exit."""

    def __call__(self, parser: ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"layerwise {version('layerwise-pruning')}")
        parser.exit()


def parse_command(arguments: Sequence[str]) -> Namespace:
    """Parse the command and its options. Without arguments the help is printed.

    Raises:
        SystemExit: the arguments are not valid (with one line on stderr), or the help or the version was printed.
    """
    values = {number + 1 for number, argument in enumerate(arguments) if argument == "--log-format"}
    words = [argument for number, argument in enumerate(arguments) if number not in values]
    command = next((word for word in words if not word.startswith("-")), None)
    parser = command_parser([] if command is None else [command])
    if not arguments:
        parser.print_help()
        parser.exit()
    commands = [*WITH_SETTINGS, *ON_STORES, "bench", "doctor"]
    if command is None and not {"-h", "--help", "--version"} & set(arguments):
        parser.error(f"a command is missing: one of {', '.join(commands)}")
    if command is not None and command not in commands:
        parser.error(f"unknown command {command!r}{_nearest(command, commands)}")
    parsed, left = parser.parse_known_args(arguments)
    if left:
        parser.error(f"unexpected argument {left[0]!r}; quote values that contain spaces")
    return parsed


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def command_parser(command: Sequence[str]) -> ArgumentParser:
    """Build the parser of all commands. The options of a command with settings are added only if it is ``command``."""
    parser = CommandParser(
        prog="layerwise",
        description="Layer-wise sparsity for large language models. `layerwise COMMAND --help` shows the options.",
        epilog=EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="Show the version and exit.")
    parser.add_argument("--debug", action="store_true", help=DEBUG)
    parser.add_argument("--log-format", choices=LOG_FORMATS, default="text", help=LOG_FORMAT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        for name, what in {**WITH_SETTINGS, **ON_STORES, "bench": BENCH, "doctor": DOCTOR}.items()
    }
    for name in ON_STORES:
        _add_arguments_of_a_store(parsers[name], name)
    _add_arguments_of_bench(parsers["bench"])
    _add_arguments_of_doctor(parsers["doctor"])
    for each in parsers.values():
        # Without defaults here, which would overwrite the options before the command.
        each.add_argument("--debug", action="store_true", default=SUPPRESS, help=DEBUG)
        each.add_argument("--log-format", choices=LOG_FORMATS, default=SUPPRESS, help=LOG_FORMAT)
    if command and command[0] in WITH_SETTINGS:
        _add_settings(parsers[command[0]], command[0])
    return parser


def _add_settings(parser: ArgumentParser, command: str) -> None:
    """Add one option for every setting of a flow."""
    from layerwise.flows.options import add_options
    from layerwise.flows.runtime import FanOutRuntime, Runtime, SearchRuntime, WorkerRuntime
    from layerwise.flows.settings import Search

    if command != "plan":
        parser.add_argument("--on-signal", choices=SIGNALS, metavar="SIGNAL", help=ON_SIGNAL)
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
    elif command == "generate-calibration":
        from layerwise.flows.generate_calibration import GenerateCalibration

        add_options(parser, GenerateCalibration)
    elif command == "compress":
        from layerwise.flows.compress import Compress

        add_options(parser, Compress)
    elif command == "distill":
        from layerwise.flows.distill import Distill

        parser.add_argument("store", help=STORE)
        parser.add_argument("search", nargs="?", metavar="key", help=NEWEST_SEARCH)
        add_options(parser, Distill, without=["search"])
        add_options(parser, Runtime, without=["store"], group="runtime")
        return
    elif command == "work":
        parser.add_argument("store", help=STORE)
        add_options(parser, WorkerRuntime, without=["store"], group="runtime")
        return
    else:
        add_options(parser, Search)
    if command == "plan":
        parser.add_argument("--no-measure", action="store_true", help=NO_MEASURE)
    runtime = {"search": SearchRuntime, "plan": SearchRuntime, "compare": FanOutRuntime}.get(command, Runtime)
    add_options(parser, runtime, group="runtime")


def _add_arguments_of_bench(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="Folder of an exported or compressed checkpoint, or the store of a finished search.",
    )
    parser.add_argument("key", nargs="?", help=NEWEST_SEARCH)
    usual = SpeedSettings()
    for name, default, what in (
        ("prompt-tokens", usual.prompt_tokens, "Length of the random prompt, in tokens; it is read at once."),
        ("new-tokens", usual.new_tokens, "Number of tokens to generate after the prompt, one at a time."),
        ("rounds", usual.rounds, "Number of measurements of each variant of the model, in turns."),
    ):
        metavar = name.rpartition("-")[2].upper()
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar=metavar, help=f"{what} Default: {default}."
        )


def _add_arguments_of_doctor(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        help=f"{STORE} It is checked, and measured with a temporary file of 34 MB, which is deleted.",
    )
    parser.add_argument(
        "--model",
        help="Model, as for search: also show what a search of it with the default settings needs. The model is read "
        "for about two seconds.",
    )


def _add_arguments_of_a_store(parser: ArgumentParser, command: str) -> None:
    parser.add_argument("store", help=STORE)
    if command == "show":
        what = "Key of an artifact or its beginning, as ls prints it. Default: the newest search."
        parser.add_argument("key", nargs="?", help=what)
    if command == "report":
        parser.add_argument("key", nargs="?", help=NEWEST_SEARCH)
        parser.add_argument("--output", type=Path, metavar="FILE", help="Also write the page to this file.")
    if command == "gc":
        parser.add_argument(
            "--apply", action="store_true", help="Delete the files. Without this option they are only shown."
        )
        parser.add_argument(
            "--results-only",
            action="store_true",
            help="Keep only results: finished searches with their models, reports, comparisons, compressed and distilled models, "
            "tables, generated texts and the records of the watcher. Stop all searches first.",
        )
    if command == "verify":
        parser.add_argument(
            "--set-aside",
            action="store_true",
            help="Take damaged artifacts out of use, so that the next search rebuilds those that it needs.",
        )
