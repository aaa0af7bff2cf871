"""Corpora and their documents, which are joined into one text and then tokenised."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

# Purpose of a text.
Role = Literal["calibration", "selection", "test"]

# Maximum number of characters that are read of a corpus. All of WikiText-2 train (10.9 MB) fits, and half of 16 MiB is
# about two million tokens, 1000 windows of 2048. A larger text would only cost time: a fast tokenizer needs 140 bytes
# of memory and 1.4 us per character of a string (measured: 16 MiB, 2.3 GB, 23 s).
TEXT_LIMIT = 16 * 2**20

# Field with the document in JSON lines, Parquet files and hub data sets; C4, WikiText and most others use this name.
TEXT_FIELD = "text"
# Fields with conversations in chat data sets.
CHAT_FIELDS = ("messages", "conversations", "conversation")
BLANK_LINE = "\n\n"  # separator of documents in all but one of the texts of published perplexities


class Corpus(ABC):
    """A sequence of documents with an identity. Equal corpora have equal documents."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Name or location of the corpus for people, without credentials."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Values that identify the documents; they become part of artifact keys."""

    @property
    def facts(self) -> dict[str, object]:
        """Facts about the corpus for reports."""
        return {"corpus": self.label, **self.identity}

    @property
    def joint(self) -> str:
        """Separator of two documents in the text."""
        return BLANK_LINE

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Yield the documents in order, reading as few as the caller needs.

        Raises:
            ValueError: the corpus cannot be read as text.
            OSError: the storage fails, or the data are damaged.
        """

    @abstractmethod
    def require_unchanged(self) -> None:
        """Check that the documents are still those of ``identity``: otherwise their text would get a wrong key.

        Raises:
            OSError: the corpus has changed since it was opened.
        """


@dataclass(frozen=True)
class Text:
    """The joined documents of a corpus.

    Attributes:
        sha256: of the UTF-8 bytes, in hex.
        truncated: whether the corpus continues after the last character.
    """

    content: str
    sha256: str
    truncated: bool


def join_documents(
    documents: Iterable[str], label: str, limit: int = TEXT_LIMIT, joint: str = BLANK_LINE
) -> Text:
    """Join documents, and cut the text after ``limit`` characters.

    Empty documents are kept, because published perplexities on WikiText-2 include them.

    Args:
        documents: read in order, and only as many as are needed.
        label: name of the corpus for messages.
        limit: maximum length of the text, in characters.
        joint: separator of two documents.

    Raises:
        ValueError: the text is empty, or it contains half a surrogate pair, which UTF-8 cannot encode.
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
            f"{label} contains no text: {len(pieces)} documents were read. Give a corpus that contains text."
        )
    try:
        sha256 = hashlib.sha256(content.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{label} has half a surrogate pair, {ascii(content[error.start])}, at character {error.start}. "
            "Tokenizers cannot read it. Remove it from the corpus."
        ) from None
    return Text(content, sha256, truncated=length > limit)


def text_of(row: Mapping[str, object], number: int, label: str, field: str = TEXT_FIELD) -> str:
    """Return the text field of a row.

    Args:
        row: values by field name.
        number: position of the row in its corpus, from 1; for messages.
        label: name of the corpus for messages.
        field: name of the field with the text.

    Raises:
        ValueError: the row has no such field, or the field is not a string.
    """
    if field not in row:
        raise ValueError(missing_field(row, label, f"row {number}", field))
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(
            f"{label}, row {number}: field {field!r} holds {type(text).__name__}, not a string. "
            "Remove or correct the row."
        )
    return text


def missing_field(fields: Iterable[str], label: str, place: str, field: str = TEXT_FIELD) -> str:
    """Return the message about a missing text field. It lists the fields that exist."""
    there = sorted(fields)
    if chats := [name for name in CHAT_FIELDS if name in there]:
        return (
            f"{label}, {place}: there is no field {field!r}, but a conversation in {chats[0]!r}. Conversations need "
            "the model's chat template, which is not applied here. Convert them to plain text with "
            f"tokenizer.apply_chat_template(..., tokenize=False), and write it into a field {field!r}."
        )
    return (
        f"{label}, {place}: there is no field {field!r}, only {there}. "
        f"Rename the field with the documents to {field!r}."
    )
