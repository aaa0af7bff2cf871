"""Open the terminal for output."""

from contextlib import AbstractContextManager

from layerwise.tasks.running.plain_console import PlainConsole

FILE_WIDTH = 200  # columns; a line of ``ls`` stays one line for grep


def open_console() -> PlainConsole:
    """Open the terminal; output that goes to a file is at least ``FILE_WIDTH`` columns wide."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=max(console.width, FILE_WIDTH))


def waiting(doing: str) -> AbstractContextManager[object]:
    """Show what the command is doing until the block ends, on a terminal only."""
    return PlainConsole(stderr=True).status(f"{doing} ...")
