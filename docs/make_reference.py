"""Write docs/cli.md and docs/settings.md from the parser and the settings. With --check: fail if they would change.

.venv/bin/python docs/make_reference.py
"""

import re
import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

from layerwise.flows.cli.parser import ON_STORES, WITH_SETTINGS, command_parser
from layerwise.flows.compare import Compare
from layerwise.flows.compress import Compress
from layerwise.flows.distill import Distill
from layerwise.flows.generate_calibration import GenerateCalibration
from layerwise.flows.runtime import FanOutRuntime, Runtime, SearchRuntime, WorkerRuntime
from layerwise.flows.settings import Search
from layerwise.flows.theory import Theory
from layerwise.flows.zero_shot import ZeroShot

FOLDER = Path(__file__).parent
MADE = "This page is made by `docs/make_reference.py`; do not edit it."


def cli() -> str:
    """Return the page of the command line."""
    parts = ["# Commands and options", f"`layerwise COMMAND --help` prints the same. {MADE}"]
    for name in [*WITH_SETTINGS, *ON_STORES, "bench", "doctor"]:
        parser = subparser(name)
        parts.append(f"## layerwise {name}\n\n{parser.description}")
        for group in parser._action_groups:
            rows = []
            for action in group._group_actions:
                if action.dest in ("help", "debug") or action.help == SUPPRESS:
                    continue
                metavar = action.metavar or action.dest.upper()
                shown = action.option_strings[-1] if action.option_strings else str(metavar)
                if action.option_strings and action.nargs != 0:
                    shown += f" {metavar}"
                rows.append((f"`{shown}`", action.help or ""))
            if rows:
                title = (
                    "Arguments" if group.title == "positional arguments" else str(group.title).capitalize()
                )
                parts.append(table((title, ""), rows))
    return page(parts)


def subparser(name: str) -> ArgumentParser:
    """Return the parser of one command, with all its options."""
    (commands,) = (action for action in command_parser([name])._actions if isinstance(action.choices, dict))
    return commands.choices[name]


def settings() -> str:
    """Return the page of the settings in Python and in Prefect's forms."""
    parts = [
        "# Settings",
        "Parameters of the flows, in Python and as JSON of a Prefect deployment. The command line has the same names with "
        f"dashes ([Commands and options](cli.md)). {MADE}",
    ]
    for each in (
        Search, Compare, Theory, ZeroShot, Compress, Distill, GenerateCalibration, Runtime, FanOutRuntime, SearchRuntime,
        WorkerRuntime,
    ):  # fmt: skip
        parent = each.__mro__[1]
        inherited = parent.model_fields if parent.__name__ in ("Runtime", "FanOutRuntime", "Search") else {}
        rows = [
            (f"`{name}`", "" if field.is_required() else f"`{field.default!r}`", field.description or "")
            for name, field in each.model_fields.items()
            if name not in inherited
        ]
        base = f"\n\nAll settings of `{parent.__name__}`, and:" if inherited else ""
        doc = (each.__doc__ or "").strip().split("\n\n")[0]
        parts.append(f"## {each.__name__}\n\n`{each.__module__}.{each.__name__}`. {doc}{base}")
        parts.append(table(("setting", "default", "meaning"), rows))
    return page(parts)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in lines)


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("%%", "%")).replace("|", "\\|").strip()


def page(parts: list[str]) -> str:
    return "\n\n".join(parts) + "\n"


def main() -> None:
    made = {FOLDER / "cli.md": cli(), FOLDER / "settings.md": settings()}
    if "--check" in sys.argv:
        old = [file.name for file, text in made.items() if not file.exists() or file.read_text() != text]
        sys.exit(f"{', '.join(old)}: run .venv/bin/python docs/make_reference.py" if old else 0)
    for file, text in made.items():
        file.write_text(text)


if __name__ == "__main__":
    main()
