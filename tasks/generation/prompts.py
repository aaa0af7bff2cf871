"""Prompts for a model: the texts and conversations of a corpus, up to the response that the model is to write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from layerwise.storage.formats.canonical_json import digest
from layerwise.tasks.texts.chat_template import RESPONDER, ChatTemplate
from layerwise.tasks.texts.documents import TEXT_FIELD, Conversation, Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    def with_response(self, response: str) -> dict[str, object]:
        """Return a row of JSON lines with the prompt and its response, as a calibration text has it."""
        if self.messages is None:
            return {TEXT_FIELD: self.text + response}
        return {"messages": [*self.messages, {"role": RESPONDER, "content": response}]}


def read_prompts(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", most: int | None, positions: int | None
) -> list[Prompt]:
    """Read the first prompts of a corpus. Responses at the end of a conversation are left out.

    Args:
        most: maximum number of prompts; None for all.
        positions: maximum number of tokens of a prompt; None if the model has no limit.

    Raises:
        ValueError: there are no prompts, one is empty or too long, or the chat template cannot write it.
        OSError: the corpus has changed since it was opened.
    """
    template = None
    prompts = []
    for number, document in enumerate(islice(corpus.documents(), most), start=1):
        place = f"{corpus.label}, document {number}"
        if isinstance(document, Conversation):
            template = template or ChatTemplate(tokenizer, corpus.label)
            prompt = _of_conversation(document, template)
        else:
            prompt = Prompt(None, document, tuple(tokenizer(document, verbose=False)["input_ids"]))
        if not prompt.token_ids:
            raise ValueError(f"{place} is empty, so the model has nothing to continue. Remove it.")
        if positions is not None and len(prompt.token_ids) > positions:
            raise ValueError(
                f"{place} is a prompt of {len(prompt.token_ids)} tokens, and the model's context has room for {positions} "
                "before the response. Remove or shorten it, or use a smaller max_tokens."
            )
        prompts.append(prompt)
    corpus.require_unchanged()
    if not prompts:
        raise ValueError(f"{corpus.label} contains no prompts. Give a file with messages, prompts or texts.")
    return prompts


def prompts_identity(prompts: Sequence[Prompt]) -> str:
    """Return a digest of all prompts."""
    return digest([{"text": prompt.text, "messages": prompt.messages is not None} for prompt in prompts])


def _of_conversation(conversation: Conversation, template: ChatTemplate) -> Prompt:
    messages = list(conversation.messages)
    while messages and messages[-1]["role"] == RESPONDER:
        messages.pop()
    if not messages:
        raise ValueError(
            f"{conversation.place} has only messages of the {RESPONDER}, and no prompt. Remove it."
        )
    text = template.prompt(Conversation(tuple(messages), conversation.place))
    return Prompt(
        messages, text, tuple(template.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    )
