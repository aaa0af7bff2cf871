"""Console that prints text without markup."""

from typing import Any

from rich.console import Console
from rich.text import Text

from layerwise.tasks.running.printable import printable


class PlainConsole(Console):
    """A rich console that ignores markup and escapes non-printable characters in every string.

    This includes the cells, titles and captions of tables. Newlines are escaped too, so print one string per line. A
    ``rich.text.Text`` is printed unchanged: make its content printable first.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)
