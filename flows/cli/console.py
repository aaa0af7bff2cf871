"""The terminal: as wide as it is, and wide enough where the output is a file."""

from layerwise.tasks.running.plain_console import PlainConsole

FILE_WIDTH = 200  # columns; so that a line of ``ls`` stays one line for grep


def open_console() -> PlainConsole:
    """The terminal; wide enough for a table where the output is a file."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=max(console.width, FILE_WIDTH))
