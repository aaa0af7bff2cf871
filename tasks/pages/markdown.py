"""Text from outside in Markdown: names of models, folders and licences are shown unchanged and never interpreted."""

import re

# Characters that start emphasis, code, links, tables, strikethrough or mathematics anywhere in a line. An underscore
# inside of a word starts nothing.
ACTIVE = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# Characters that turn a line into a heading, a list item or a rule if it starts with them.
LEADING = re.compile(r"(\d*)([-+#=.)])(?=[-=#\s]|$)")


def displayable(text: str) -> str:
    """Return the text on one line, with U+FFFD in place of characters that cannot be printed."""
    words = " ".join(text.split())
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in words)


def plain(text: str) -> str:
    """Return Markdown that shows the text on one line, at any position."""
    escaped = ACTIVE.sub(r"\\\g<0>", displayable(text))
    if leading := LEADING.match(escaped):
        escaped = f"{leading[1]}\\{escaped[leading.start(2) :]}"
    return "".join(ENTITIES.get(each, each) for each in escaped)


def code(text: str) -> str:
    """Return Markdown that shows the text as code on one line. Not for table cells, which end at a bar."""
    line = displayable(text)
    ticks = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def fenced(text: str, language: str = "text") -> str:
    """Return a code block with the text, including its line breaks."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.encode(errors='replace').decode()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
