"""List the artifacts of a store."""

from datetime import UTC, datetime
from typing import Literal

from rich.table import Table
from rich.text import Text

from layerwise.display.byte_size import size
from layerwise.flows.cli.console import open_console
from layerwise.storage.existing_store import existing_store
from layerwise.tasks.running.printable import printable

KEY_DIGITS = 12  # of 32: enough for ``show``, and leaves room for the other columns
LONGEST = 31  # characters of a text that is listed; digests and sentences are longer


def list_artifacts(store_url: str) -> None:
    """Print one line per artifact of a store, the newest last.

    Raises:
        FileNotFoundError: there is no store at ``store_url``.
        OSError: the storage cannot be reached.
    """
    console = open_console()
    by_age = sorted(existing_store(store_url).artifacts(), key=lambda artifact: artifact.committed)
    if not by_age:
        console.print("The store has no artifacts.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("artifact", "made", "seconds", "size", "what"):
        # rich shrinks columns that may wrap first; the text of the last one is cut instead, so that it stays one line.
        justify: Literal["left", "right"] = "right" if name in ("seconds", "size") else "left"
        table.add_column(name, justify=justify, no_wrap=name != "what")
    for artifact in by_age:
        facts = [f"{name} {_plain(value)}" for name, value in artifact.facts.items() if _is_listed(value)]
        table.add_row(
            artifact.key[: artifact.key.index("/") + 1 + KEY_DIGITS],
            f"{datetime.fromtimestamp(artifact.committed, UTC):%Y-%m-%d %H:%M}",
            f"{artifact.made['seconds']:.1f}",
            size(artifact.size),
            Text(printable("; ".join(facts)), no_wrap=True, overflow="ellipsis"),
        )
    console.print(table)


def _is_listed(value: object) -> bool:
    """Return whether a fact is listed: numbers and short texts are; ``show`` prints the others."""
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= LONGEST)


def _plain(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
