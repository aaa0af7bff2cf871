"""Documents of a corpus, joined to the one text that is tokenised."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

# What a text is for.
Role = Literal["calibration", "selection", "test"]

# The largest text that is read, in characters. All of WikiText-2 train (10.9 MB) fits, and half of 16 MiB is
# about two million tokens, 1000 windows of 2048. More would only cost: a fast tokenizer needs 140 bytes of
# memory and 1.4 us for each character of a text that it gets as one string (measured: 16 MiB, 2.3 GB, 23 s).
TEXT_LIMIT = 16 * 2**20

# The field of a JSON line, a Parquet file or a hub data set: what C4, WikiText and most others call it.
TEXT_FIELD = "text"
# Fields of conversations: what chat data sets call them.
CHAT_FIELDS = ("messages", "conversations", "conversation")
BLANK_LINE = (
    "\n\n"  # what stands between two documents, for all but one of the texts of published perplexities
)


@dataclass(frozen=True)
class Text:
    """The joined documents of a corpus."""

    content: str
    sha256: str  # of the UTF-8 bytes, in hex
    truncated: bool  # the corpus goes on after the last character


def join_documents(
    documents: Iterable[str], label: str, limit: int = TEXT_LIMIT, joint: str = BLANK_LINE
) -> Text:
    """Join documents and stop after ``limit`` characters, within a document if need be.

    Empty documents are kept: the published perplexities on WikiText-2 have them in the text.

    Args:
        documents: read in order, and only as many as are needed.
        label: name of the corpus, for errors.
        limit: the largest text wanted, in characters.
        joint: what comes between two documents.

    Raises:
        ValueError: no text at all, or half a surrogate pair, which UTF-8 (and a tokenizer) can't express.
    """
    pieces: list[str] = []
    length = 0
    for document in documents:
        if pieces:
            document = joint + document
        pieces.append(document)
        length += len(document)
        if length > limit:
            break
    content = "".join(pieces)[:limit]
    if not content.strip():
        raise ValueError(
            f"{label} holds no text: {len(pieces)} documents were read. Name a corpus with text in it."
        )
    try:
        sha256 = hashlib.sha256(content.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{label} has half a surrogate pair, {ascii(content[error.start])}, at character {error.start}, "
            "which no tokenizer can read. Remove it from the corpus."
        ) from None
    return Text(content, sha256, truncated=length > limit)


def text_of(row: Mapping[str, object], number: int, label: str, field: str = TEXT_FIELD) -> str:
    """The text field of a row.

    Args:
        row: field name -> value.
        number: of the row in its corpus, the first one is 1; for errors.
        label: name of the corpus, for errors.
        field: that holds the text.

    Raises:
        ValueError: the row has no such field, or it is no string.
    """
    if field not in row:
        raise ValueError(missing_field(row, label, f"row {number}", field))
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(
            f"{label}, row {number}: field {field!r} holds {type(text).__name__}, not a string. "
            "Remove or repair the row."
        )
    return text


def missing_field(fields: Iterable[str], label: str, place: str, field: str = TEXT_FIELD) -> str:
    """Message for a corpus without the text field; lists the fields that are there."""
    there = sorted(fields)
    if chats := [name for name in CHAT_FIELDS if name in there]:
        return (
            f"{label}, {place}: there is no field {field!r}, but a conversation in {chats[0]!r}. Conversations need "
            "the model's chat template, which is not applied here. Write them as plain text into a field "
            f"{field!r} first, with tokenizer.apply_chat_template(..., tokenize=False)."
        )
    return (
        f"{label}, {place}: there is no field {field!r}, only {there}. "
        f"Rename the field that holds the documents to {field!r}."
    )
