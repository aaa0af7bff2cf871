"""Corpora and their documents: texts, which are joined into one, or conversations."""

import hashlib
import json
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
ONE_KIND = "Put texts and conversations into different files; a calibration mix may have both."
BLANK_LINE = "\n\n"  # separator of documents in all but one of the texts of published perplexities


@dataclass(frozen=True)
class Conversation:
    """A conversation; the model's chat template decides its text.

    Attributes:
        messages: messages as chat templates read them: ``role``, ``content`` and possibly more.
        place: row of the corpus, for messages.
    """

    messages: tuple[Mapping[str, object], ...]
    place: str


Document = str | Conversation


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
    def documents(self) -> Iterator[Document]:
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


@dataclass(frozen=True)
class Conversations:
    """The conversations of a corpus.

    Attributes:
        truncated: whether the corpus continues after the last one.
    """

    items: tuple[Conversation, ...]
    truncated: bool


def join_documents(
    documents: Iterable[Document], label: str, limit: int = TEXT_LIMIT, joint: str = BLANK_LINE
) -> Text:
    """Join documents, and cut the text after ``limit`` characters.

    Empty documents are kept, because published perplexities on WikiText-2 include them.

    Args:
        documents: read in order, and only as many as are needed.
        label: name of the corpus for messages.
        limit: maximum length of the text, in characters.
        joint: separator of two documents.

    Raises:
        ValueError: the text is empty, contains half a surrogate pair, which UTF-8 cannot encode, or is followed by a
            conversation.
    """
    pieces: list[str] = []
    length = 0
    for document in documents:
        if isinstance(document, Conversation):
            raise ValueError(
                f"{document.place} is a conversation, and the rows before it are texts. {ONE_KIND}"
            )
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
    return Text(content, sha256_of(content, label), truncated=length > limit)


def sha256_of(content: str, label: str) -> str:
    """Return the SHA-256 of the UTF-8 bytes of a text, in hex.

    Raises:
        ValueError: the text contains half a surrogate pair, which UTF-8 cannot encode; names its position.
    """
    try:
        return hashlib.sha256(content.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{label} has half a surrogate pair, {ascii(content[error.start])}, at character {error.start}. "
            "Tokenizers cannot read it. Remove it from the corpus."
        ) from None


def collect_conversations(
    documents: Iterable[Document], label: str, limit: int = TEXT_LIMIT
) -> Conversations:
    """Return the first conversations, at least one, with at most ``limit`` characters of JSON together.

    Raises:
        ValueError: a conversation is followed by a text, or has a value that JSON does not have.
    """
    items: list[Conversation] = []
    length = 0
    for document in documents:
        if not isinstance(document, Conversation):
            raise ValueError(
                f"{label}, document {len(items) + 1} is a text, and those before it are conversations. {ONE_KIND}"
            )
        length += characters_of(document)
        if items and length > limit:
            return Conversations(tuple(items), truncated=True)
        items.append(document)
    return Conversations(tuple(items), truncated=False)


def characters_of(conversation: Conversation) -> int:
    """Return the length of the JSON of a conversation.

    Raises:
        ValueError: a message has a value that JSON does not have, such as a date or bytes of a Parquet file; names the row.
    """
    try:
        return len(json.dumps(conversation.messages, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{conversation.place}: a message has a value that JSON does not have ({error}). Write it as text, or remove it."
        ) from error
