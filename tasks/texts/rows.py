"""Rows of JSON lines, Parquet files and hub data sets: the text or the conversation that a row holds."""

from collections.abc import Iterable, Mapping, Sequence

from layerwise.tasks.texts.documents import TEXT_FIELD, Conversation, Document

# Fields with the messages of a conversation, and pairs of fields with a user's message and the response to it.
CHAT_FIELDS = ("messages", "conversations", "conversation")
PAIR_FIELDS = (("prompt", "completion"), ("prompt", "response"))


def document_of(row: Mapping[str, object], number: int, label: str, field: str = TEXT_FIELD) -> Document:
    """Return the text of a row; without a field for it, the conversation.

    Args:
        row: values by field name.
        number: position of the row in its corpus, from 1; for messages.
        label: name of the corpus for messages.
        field: name of the field with the text.

    Raises:
        ValueError: the row has neither text nor conversation, or a value that cannot be one.
    """
    place = f"{label}, row {number}"
    fields = fields_of_document(row, place, field)
    if fields == (field,):
        text = row[field]
        if not isinstance(text, str):
            raise ValueError(
                f"{place}: field {field!r} holds {type(text).__name__}, not a string. Remove or correct the row."
            )
        return text
    if len(fields) == 1:
        return Conversation(_messages(row[fields[0]], f"{place}: field {fields[0]!r}"), place)
    prompt, response = (
        _turns(row[name], role, f"{place}: field {name!r}")
        for name, role in zip(fields, ("user", "assistant"), strict=True)
    )
    return Conversation(prompt + response, place)


def fields_of_document(fields: Iterable[str], place: str, field: str = TEXT_FIELD) -> tuple[str, ...]:
    """Return the fields that hold the document: the one of the text, the one of a conversation, or a prompt and a response.

    Raises:
        ValueError: there are none; lists the fields that exist.
    """
    there = set(fields)
    choices = ((field,), *((name,) for name in CHAT_FIELDS), *PAIR_FIELDS)
    for choice in choices:
        if there.issuperset(choice):
            return choice
    raise ValueError(
        f"{place}: there is no field {field!r}, only {sorted(there)}. Rename the field with the documents to {field!r}, "
        f"or those of conversations to 'messages', or to 'prompt' and 'completion'."
    )


def _turns(value: object, role: str, place: str) -> tuple[Mapping[str, object], ...]:
    """Return the messages of one side: one message if it is a string, else a list of messages."""
    return ({"role": role, "content": value},) if isinstance(value, str) else _messages(value, place)


def _messages(value: object, place: str) -> tuple[Mapping[str, object], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        shown = "no messages" if value in ([], ()) else f"{type(value).__name__}, not a list of messages"
        raise ValueError(f"{place} holds {shown}. Remove or correct the row.")
    messages = []
    for message in value:
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or not (isinstance(message.get("content"), str | list) or message.get("tool_calls"))
        ):
            keys = f"fields {sorted(message)}" if isinstance(message, Mapping) else type(message).__name__
            raise ValueError(
                f"{place} has a message without a role or without content ({keys}). Write every message as "
                '{"role": "user", "content": "..."}; the role of responses is "assistant".'
            )
        # Parquet files give every message the fields of all messages. Templates treat a null unlike a missing field.
        messages.append({name: each for name, each in message.items() if each is not None})
    return tuple(messages)
