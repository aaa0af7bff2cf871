"""The terminal, for text that is shown as it is."""

from typing import Any

from rich.console import Console
from rich.text import Text

from layerwise.tasks.running.printable import printable


class PlainConsole(Console):
    """A console for which no string is markup, and which replaces what is not printable in every string.

    That includes the cells, titles and captions of tables. A newline in a string is replaced, too: print a string per
    line. A ``rich.text.Text`` is printed as it is; make what it holds printable first.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)
