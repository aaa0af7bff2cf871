"""Escape text from outside before it is shown on a terminal, in a log or in a figure."""


def printable(text: str) -> str:
    r"""Replace every non-printable character with its escape, e.g. ``\x1b``, ``\n``, ``\u202e``.

    Names of models, files and hosts come from other people. They may contain control characters, which a terminal
    executes and XML forbids; characters that reverse the writing direction; and surrogates, if a file name is not
    UTF-8. A character is printable if ``repr`` shows it unchanged.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def one_line(text: str) -> str:
    """Join the lines of ``text`` with spaces, and make them printable."""
    return " ".join(printable(line.strip()) for line in text.split("\n") if line.strip())
