"""Token stream of a corpus: its text tokenised as one string, or its conversations one after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.tasks.texts.chat_template import ChatTemplate, ChatText
from layerwise.tasks.texts.corpora import read_text
from layerwise.tasks.texts.documents import Conversations, Corpus, sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENISED_TOGETHER = 256  # conversations per call of the tokenizer


@dataclass(frozen=True)
class TokenStream:
    """All tokens of a corpus.

    Attributes:
        token_ids: int64, shape ``(tokens,)``.
        sha256: of the UTF-8 bytes of the tokenised text, in hex.
        characters: length of that text.
        truncated: whether the corpus is longer than the text that was read.
        responses: ``True`` for tokens that the model writes in a conversation, shape ``(tokens,)``; None for plain text.
        conversations: number of conversations; None for plain text.
    """

    token_ids: Tensor
    sha256: str
    characters: int
    truncated: bool
    responses: Tensor | None = None
    conversations: int | None = None


def tokenise_corpus(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase") -> TokenStream:
    """Read and tokenise a corpus.

    A text is tokenised as one string, with the special tokens that the tokenizer adds by default. Conversations are
    tokenised one by one, as the chat template writes them, and packed: each one follows the one before.

    Raises:
        ValueError: the corpus cannot be read, or it has conversations and the tokenizer cannot write them.
        OSError: the corpus has changed since it was opened.
    """
    text = read_text(corpus)
    if isinstance(text, Conversations):
        return _packed(text, corpus.label, tokenizer)
    # verbose=False suppresses the warning about texts longer than the model's context; this text is cut later.
    encoded = tokenizer(
        text.content, truncation=False, padding=False, return_attention_mask=False, verbose=False
    )
    token_ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    return TokenStream(token_ids, text.sha256, len(text.content), text.truncated)


def _packed(conversations: Conversations, label: str, tokenizer: "PreTrainedTokenizerBase") -> TokenStream:
    template = ChatTemplate(tokenizer, label)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{label} contains conversations, but the model's tokenizer is not one of the package tokenizers, and does not "
            "say which characters a token has. Put a tokenizer.json next to the weights, or give plain text."
        )
    texts = [template.write(conversation) for conversation in conversations.items]
    whole = "".join(text.content for text in texts)
    sha256 = sha256_of(whole, label)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    token_ids: list[int] = []
    responses: list[Tensor] = []
    for first in range(0, len(texts), TOKENISED_TOGETHER):
        together = texts[first : first + TOKENISED_TOGETHER]
        encoded = tokenizer(
            [text.content for text in together],
            add_special_tokens=False,  # the template writes them
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for text, ids, offsets in zip(together, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            token_ids += ids
            is_special = torch.tensor([number in special for number in ids], dtype=torch.bool)
            responses.append(_mask(text, offsets, is_special))
    return TokenStream(
        torch.tensor(token_ids, dtype=torch.int64),
        sha256,
        len(whole),
        conversations.truncated,
        torch.cat(responses),
        len(texts),
    )


def _mask(text: ChatText, offsets: Sequence[tuple[int, int]], is_special: Tensor) -> Tensor:
    """Mark the tokens that have a character of a response.

    A special token in front of a response may include the white space after it, which is no reason to mark it.

    Args:
        offsets: start and end of every token in the text.
        is_special: whether a token is a special one, shape ``(tokens,)``.

    Returns:
        Boolean mask, shape ``(tokens,)``.
    """
    starts, ends = torch.tensor(offsets, dtype=torch.int64).reshape(-1, 2).T
    mask = torch.zeros_like(is_special)
    for start, end in text.responses:
        mask |= (starts < end) & (ends > start) & ~(is_special & (starts < start))
    return mask
