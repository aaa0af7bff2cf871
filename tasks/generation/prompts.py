"""Prompts for a model: the texts and conversations of a corpus, up to the response that the model is to write."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.storage.formats.canonical_json import digest
from layerwise.tasks.texts.chat_template import RESPONDER, ChatTemplate
from layerwise.tasks.texts.documents import (
    TEXT_FIELD,
    TEXT_LIMIT,
    Conversation,
    Corpus,
    characters_of,
    sha256_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What a model continues.

    Attributes:
        messages: messages of a conversation; None for a plain text.
        text: text that the tokenizer gets: the plain text, or the messages as the chat template writes them.
        token_ids: tokens of that text.
    """

    messages: Sequence[Mapping[str, object]] | None
    text: str
    token_ids: tuple[int, ...]

    def with_response(
        self, token_ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, object]:
        """Return a row of JSON lines with the prompt and its response, as a calibration text has it.

        Args:
            token_ids: tokens of the response.
        """
        response = _decoded(tokenizer, token_ids)
        if self.messages is None:
            # Decoded after its prompt: tokenizers such as Llama 2's drop the space in front of the first token.
            prompt, whole = (
                _decoded(tokenizer, each) for each in (self.token_ids, [*self.token_ids, *token_ids])
            )
            return {TEXT_FIELD: self.text + (whole[len(prompt) :] if whole.startswith(prompt) else response)}
        return {"messages": [*self.messages, {"role": RESPONDER, "content": response}]}


def read_prompts(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    most: int | None,
    positions: int | None,
    limit: int = TEXT_LIMIT,
) -> list[Prompt]:
    """Read the first prompts of a corpus. Responses at the end of a conversation are left out.

    Rows that are empty or too long are skipped, with a warning.

    Args:
        most: maximum number of prompts; None for all.
        positions: maximum number of tokens of a prompt; None if the model has no limit.
        limit: maximum number of characters to read, including those of skipped rows.

    Raises:
        ValueError: there are no prompts that the model can answer, or a row cannot be one.
        OSError: the corpus has changed since it was opened.
    """
    template = None
    prompts: list[Prompt] = []
    characters, empty, too_long = 0, 0, 0
    for number, document in enumerate(corpus.documents(), start=1):
        if len(prompts) == most:
            break
        characters += characters_of(document) if isinstance(document, Conversation) else len(document)
        if characters > limit:
            logger.warning(
                "%s has more than %d characters, the maximum: only its first %d rows are read",
                corpus.label, limit, number - 1,
            )  # fmt: skip
            break
        if isinstance(document, Conversation):
            template = template or ChatTemplate(tokenizer, corpus.label)
            prompt = _of_conversation(document, template)
        else:
            prompt = _prompt(None, document, f"{corpus.label}, document {number}", tokenizer)
        if not prompt.token_ids or not prompt.text.strip():
            empty += 1
        elif positions is not None and len(prompt.token_ids) > positions:
            too_long += 1
        else:
            prompts.append(prompt)
    corpus.require_unchanged()
    skipped = f"{empty} empty rows"
    if positions is not None:
        skipped += f" and {too_long} rows of more than {positions} tokens, the room in the context before the response"
    if not prompts:
        raise ValueError(
            f"{corpus.label} contains no prompts that the model can answer; it has {skipped}, in the first "
            f"{min(characters, limit)} characters. Give a file with messages, prompts or texts, shorten them, or use a "
            "smaller max_tokens."
        )
    if empty or too_long:
        logger.warning("%s: skipped %s", corpus.label, skipped)
    return prompts


def prompts_identity(prompts: Sequence[Prompt]) -> str:
    """Return a digest of all prompts, with the messages, which are part of the rows."""
    return digest([{"text": prompt.text, "messages": prompt.messages} for prompt in prompts])


def _of_conversation(conversation: Conversation, template: ChatTemplate) -> Prompt:
    messages = list(conversation.messages)
    while messages and messages[-1]["role"] == RESPONDER:
        messages.pop()
    if not messages:
        raise ValueError(
            f"{conversation.place} has only messages of the {RESPONDER}, and no prompt. Remove it."
        )
    text = template.prompt(Conversation(tuple(messages), conversation.place))
    return _prompt(messages, text, conversation.place, template.tokenizer)


def _prompt(
    messages: Sequence[Mapping[str, object]] | None,
    text: str,
    place: str,
    tokenizer: "PreTrainedTokenizerBase",
) -> Prompt:
    sha256_of(text, place)  # refuses half a surrogate pair
    # A chat template writes the special tokens itself.
    token_ids = tokenizer(text, add_special_tokens=messages is None, verbose=False)["input_ids"]
    return Prompt(messages, text, tuple(token_ids))


def _decoded(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    assert isinstance(text, str), "one list of tokens is one text"
    return text
