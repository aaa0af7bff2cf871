"""Foreign text in Markdown: names of models, folders and licences, shown as they are and nothing else."""

import re

# What begins emphasis, code, links, tables, strikethrough or mathematics anywhere in a line. An underscore within a
# word begins nothing.
ACTIVE = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# What makes a heading, a list or a rule of a line that begins with it.
LEADING = re.compile(r"(\d*)([-+#=.)])(?=[-=#\s]|$)")


def one_line(text: str) -> str:
    """The text on one line, with a sign for whatever cannot be shown."""
    words = " ".join(text.split())
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in words)


def plain(text: str) -> str:
    """Markdown that shows the text, on one line, wherever it stands."""
    escaped = ACTIVE.sub(r"\\\g<0>", one_line(text))
    if leading := LEADING.match(escaped):
        escaped = f"{leading[1]}\\{escaped[leading.start(2) :]}"
    return "".join(ENTITIES.get(each, each) for each in escaped)


def code(text: str) -> str:
    """Markdown that shows the text as code, on one line; not for a cell of a table, which ends at a bar."""
    line = one_line(text)
    ticks = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def fenced(text: str, language: str = "text") -> str:
    """A block of code that holds the text, which may be copied from it; its lines stay lines."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.encode(errors='replace').decode()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
