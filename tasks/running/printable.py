"""Text from outside, made fit for a terminal, a log and a figure."""


def printable(text: str) -> str:
    r"""Replace every character that is not printable with its escape: ``\x1b``, ``\n``, ``\u202e``.

    Names of models, files and hosts come from others. They may hold control characters, which a terminal obeys and
    XML forbids; characters that reverse the direction of writing; and surrogates, where a file name is not UTF-8.
    Printable is what ``repr`` shows as it is.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def one_line(text: str) -> str:
    """The lines of ``text`` joined by spaces, each printable."""
    return " ".join(printable(line.strip()) for line in text.split("\n") if line.strip())
