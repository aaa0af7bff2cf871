"""A mix of texts for calibration, such as ``c4:64,file:chat.jsonl:32,wikitext2:32``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.tasks.texts.hub_corpus import PAPER_NAMES

# Start of a source. Paths begin with "file:", so that a comma in a path or URL does not start another source. A name
# such as c4 is only a source if nothing but a number of windows follows it. hf:// is fsspec's protocol.
SOURCE = rf"(?:(?:builtin|{'|'.join(PAPER_NAMES)})(?:\s*:\s*\d+)?\s*(?=,|$)|hf:(?!//)|file:)"
STARTS_WITH_SOURCE = re.compile(SOURCE)
BETWEEN_SOURCES = re.compile(rf",\s*(?={SOURCE})")
NAME_AND_WINDOWS = re.compile(r"(?P<name>.*?)(?:\s*:\s*(?P<windows>\d+))?\s*", re.DOTALL)
LOOKS_LIKE_MIX = re.compile(r",|:\s*\d+$")


@dataclass(frozen=True)
class MixSource:
    """One text of a mix.

    Attributes:
        name: name of the corpus, see ``layerwise.tasks.texts.corpora.open_corpus``.
        windows: number of its windows; None if all texts of the mix share the windows equally.
    """

    name: str
    windows: int | None


def parse_mix(value: str) -> tuple[MixSource, ...]:
    """Return the sources of a mix; nothing if ``value`` is the name of one text.

    A mix has at least two sources, separated by commas: ``builtin``, ``wikitext2``, ``c4``, ``ptb``, ``hf:...``, or
    ``file:`` and a path or URL. Any other value is one text. ``:NUMBER`` at the end of a source is its number of windows.

    Raises:
        ValueError: a source has no name; only some sources have a number of windows; or one has 0 windows.
    """
    if STARTS_WITH_SOURCE.match(value) is None:
        return ()
    pieces = BETWEEN_SOURCES.split(value)
    if any(piece.rstrip().endswith(",") for piece in pieces):
        raise ValueError(
            f"the mix {value!r} has a comma without a text after it. Remove it, or write the missing text."
        )
    if len(pieces) == 1:
        return ()
    sources = tuple(map(_source, pieces))
    if not all(source.name for source in sources):
        raise ValueError(
            f"the mix {value!r} has a text without a name. Write a path or URL after file:, as in file:chat.jsonl:32."
        )
    if missing := [source.name for source in sources if source.windows is None]:
        if len(missing) < len(sources):
            raise ValueError(
                f"a mix has a number of windows for some of its texts, but not for {', '.join(missing)}. Give "
                "one for every text, as in c4:64,wikitext2:32, or for none, and they share the windows equally. In a mix, "
                "a number at the end of a name is always a number of windows."
            )
    elif empty := [source.name for source in sources if source.windows == 0]:
        raise ValueError(f"a mix has 0 windows of {empty[0]}. Leave it out, or give 1 or more.")
    return sources


def equal_or_given(sources: Sequence[MixSource], total: int) -> tuple[int, ...]:
    """Return the number of windows of every source of a mix with ``total`` windows."""
    given = [source.windows for source in sources]
    return tuple(
        windows if windows is not None else share
        for windows, share in zip(given, proportional_shares(total, [1] * len(sources)), strict=True)
    )


def proportional_shares(total: int, weights: Sequence[int]) -> list[int]:
    """Divide ``total`` in proportion to weights. Largest remainders are rounded up, the first ones if they are equal."""
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(total * weights[index] % whole))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def interleaved(counts: Sequence[int]) -> list[int]:
    """Return an order of windows in which every beginning and every end has the proportions of the whole.

    Args:
        counts: number of windows of every source.

    Returns:
        Positions in the concatenation of all sources' windows.
    """
    places = [
        ((number + 0.5) / count, source) for source, count in enumerate(counts) for number in range(count)
    ]
    return sorted(range(len(places)), key=places.__getitem__)


def mix_hint(name: str) -> str:
    """Return a sentence on the form of a mix if a name that is not that of a text looks like one; else ""."""
    if LOOKS_LIKE_MIX.search(name) is None:
        return ""
    return (
        " A mix of texts has at least two of them, is only for calibration, and has file: before every path, as in "
        "c4:64,file:chat.jsonl:32."
    )


def _source(piece: str) -> MixSource:
    match = NAME_AND_WINDOWS.fullmatch(piece)
    assert match is not None, "every text matches"
    return MixSource(_name(match["name"]), None if match["windows"] is None else int(match["windows"]))


def _name(written: str) -> str:
    """Return the name of a source without the ``file:`` that marks a path."""
    path = written.removeprefix("file:")
    if path == written or path.startswith("//"):  # file:///folder is a URL
        return written
    is_name = path == "builtin" or path in PAPER_NAMES or (path.startswith("hf:") and "://" not in path)
    return f"./{path}" if is_name else path
