"""The terminal: as wide as it is, and wide enough where the output is a file; sizes for people."""

from layerwise.tasks.running.plain_console import PlainConsole

FILE_WIDTH = 200  # columns; so that a line of ``ls`` stays one line for grep


def open_console() -> PlainConsole:
    """The terminal; wide enough for a table where the output is a file."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=max(console.width, FILE_WIDTH))


def size(count: int) -> str:
    """Bytes for people; nothing for none."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if count else ""
        value /= 1000
    return f"{value:.3g} TB"
