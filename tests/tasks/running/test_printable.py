"""Printable text: names from outside are neither terminal commands nor markup."""

import io

import pytest
from rich.table import Table

from layerwise.tasks.running.plain_console import PlainConsole
from layerwise.tasks.running.printable import one_line, printable

NAMES = {
    "\x1b[2J": r"\x1b[2J",
    "a\x07b": r"a\x07b",
    "over\rwritten": r"over\rwritten",
    "two\nlines": r"two\nlines",
    "\x9b31m": r"\x9b31m",
    "gnp.\u202eexe": r"gnp.\u202eexe",
    "a\u2066b\u2069": r"a\u2066b\u2069",
    "a\u2028b": r"a\u2028b",
    "caf\udce9": r"caf\udce9",
    "\uffff": r"\uffff",
    "models [old]": "models [old]",
    "models[": "models[",
    "[/x] [red]": "[/x] [red]",
    ":smile:": ":smile:",
    "Größe 模型 \N{GRINNING FACE}": "Größe 模型 \N{GRINNING FACE}",
}


@pytest.mark.parametrize("name", NAMES)
def test_only_characters_that_are_not_printable_are_replaced(name):
    assert printable(name) == NAMES[name]


def test_the_lines_of_an_error_are_joined():
    assert one_line("not found\n\n  Check it.\n") == "not found Check it."
    assert one_line("name\x1b[0m\n") == r"name\x1b[0m"


@pytest.fixture
def console() -> PlainConsole:
    console = PlainConsole(width=120)
    console.file = io.StringIO()
    return console


def printed(console: PlainConsole) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_console_prints_a_name_unchanged_or_escaped(console, name):
    console.print(f"Report: {name}", style="bold", soft_wrap=True)
    assert printed(console) == f"Report: {NAMES[name]}\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_table_shows_a_name_unchanged_or_escaped_in_all_of_its_parts(console, name):
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    console.print(table)
    assert printed(console).count(NAMES[name]) == 4
