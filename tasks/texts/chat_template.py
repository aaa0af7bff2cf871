"""Conversations as text: the chat template of a tokenizer, and the parts of the text that the model writes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from layerwise.tasks.texts.documents import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, object]]

RESPONDER = "assistant"  # role of the messages that the model writes
MARKS_RESPONSES = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Two responses without a common start or end. The texts of a conversation with the one and with the other differ
# exactly where the response stands.
STAND_INS = ("Apple pie", "Banana split")
PROBE = "Cherry tart"  # content of a message that shows in which form a template reads contents
# Errors of a template: its own (raise_exception), and those of operations on values that it does not expect.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)
# Some templates write the current date, so that the same conversation would have other tokens tomorrow. This is the date
# that the templates of Llama 3 write if they are not given one. The last line keeps the start of the template as it is.
DATE = {
    "%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%B": "July", "%b": "Jul", "%d": "26", "%-d": "26", "%e": "26",
    "%A": "Friday", "%a": "Fri", "%j": "208", "%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM",
}  # fmt: skip
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace({directive!r}, {value!r})" for directive, value in DATE.items())
    + " -}}{%- endmacro %}{{ '' }}"
)


@dataclass(frozen=True)
class ChatText:
    """The text of a conversation.

    Attributes:
        responses: start and end of every response in the text: what the model writes, up to and including the token that
            ends its turn.
    """

    content: str
    responses: tuple[tuple[int, int], ...]


class ChatTemplate:
    """The chat template of a tokenizer.

    Most templates read the content of a message as a string. Those of some multimodal models (LLaVA, SmolVLM, Idefics)
    read a list of parts and silently leave out strings. For these, strings become lists with one part.

    Args:
        label: name of the corpus for messages.

    Raises:
        ValueError: the tokenizer has no chat template, or several and none of them is the default; or the template has an
            error, or does not write the content of a message.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", label: str) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"{label} contains conversations, but the model's tokenizer has no chat template, which decides how they "
                "become text. Use a model that was trained on conversations (often named -Instruct or -Chat), put its "
                "chat_template.jinja next to the weights, or give plain text."
            )
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"{label} contains conversations, but the model's chat template is not known: {error} Name one of the "
                "templates 'default'."
            ) from error
        self.tokenizer = tokenizer
        self.template: str = FIXED_DATE + template if "strftime_now" in template else template
        self.marks_responses = MARKS_RESPONSES.search(template) is not None
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # A turn does not end with the token that starts a text, unless one token has both meanings.
        self.ends_of_turn = {tokenizer.eos_token} | special - {tokenizer.bos_token} - {None}
        self.reads_parts = False
        self.reads_parts = self._drops_strings()

    def write(self, conversation: Conversation) -> ChatText:
        """Return the text of a conversation and its responses.

        Raises:
            ValueError: the template refuses the conversation, or writes a response twice; names the row.
        """
        messages = conversation.messages
        try:
            content = self._text(messages)
            ranges = self._marked(messages) if self.marks_responses else self._found(messages, content)
        except REFUSALS as error:
            raise _refused(conversation, error) from error
        return ChatText(content, tuple(ranges))

    def prompt(self, conversation: Conversation) -> str:
        """Return the text of a conversation up to the response that the model is to write.

        Raises:
            ValueError: the template refuses the conversation; names the row.
        """
        try:
            return self._text(conversation.messages, add_generation_prompt=True)
        except REFUSALS as error:
            raise _refused(conversation, error) from error

    def _text(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            self._readable(messages),
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        assert isinstance(text, str), "one conversation that is not tokenised is one string"
        return text

    def _readable(self, messages: Messages) -> list[dict[str, Any]]:
        """Return the messages with their contents in the form that the template reads."""
        readable: list[dict[str, Any]] = [dict(message) for message in messages]
        for message in readable:
            if self.reads_parts and isinstance(message.get("content"), str):
                message["content"] = _parts(message["content"])
        return readable

    def _drops_strings(self) -> bool:
        """Return whether the template writes a content only if it is a list of parts."""
        reason = ""
        contents: tuple[object, ...] = (PROBE, _parts(PROBE))
        for content in contents:
            message = {"role": "user", "content": content}
            # Some templates require a system message.
            for before in ([], [{"role": "system", "content": ""}]):
                try:
                    if PROBE in self._text([*before, message]):
                        return content is not PROBE
                except TemplateSyntaxError as error:
                    raise ValueError(
                        f"the model's chat template has an error in line {error.lineno}: {error.message} Correct its "
                        "chat_template.jinja or tokenizer_config.json, or give plain text."
                    ) from error
                except REFUSALS as error:
                    reason = reason or str(error)
        raise ValueError(
            f"the model's chat template does not write a message of the user, neither with a string nor with a list of parts "
            f"as its content ({reason or 'it leaves out the content'}). Correct the template, or give plain text."
        )

    def _marked(self, messages: Messages) -> list[tuple[int, int]]:
        """Return the ranges that the template itself marks as generated by the model."""
        # apply_chat_template has the ranges only as a mask of tokens, in which a response whose last character belongs to
        # no token extends to the end of the conversation.
        from transformers.utils.chat_template_utils import render_jinja_template

        special_tokens: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        rendered: Any = (
            render_jinja_template(  # annotated as a string, but returns the texts and their ranges
                [self._readable(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **special_tokens,
            )
        )
        _, (ranges,) = rendered
        return [(start, end) for start, end in ranges]

    def _found(self, messages: Messages, content: str) -> list[tuple[int, int]]:
        ranges = []
        for index, message in enumerate(messages):
            if message["role"] == RESPONDER and (found := self._response(messages, index, content)):
                ranges.append(found)
        return ranges

    def _response(self, messages: Messages, index: int, content: str) -> tuple[int, int] | None:
        """Return the range of one response; None if the template leaves it out.

        The response is replaced by two others. What all three texts have in common before and after it is not part of the
        response, whatever the template does with its content: trims it, or writes tool calls or thoughts from other fields.

        Some templates refuse a response without tool calls in its place, such as Mistral's if the result of a tool follows.
        Then the response is found by the text before it. The last choice is to replace only the content, which leaves
        out tool calls.
        """
        others = self._replaced(messages, index, {"role": RESPONDER})
        if others is None:
            if found := self._after_prompt(messages, index, content):
                return found
            others = self._replaced(messages, index, messages[index])
        if others is None or others[0] == others[1]:
            return None
        if others[0].count(STAND_INS[0]) - others[1].count(STAND_INS[0]) > 1:
            raise ValueError("it writes a response more than once, so its tokens are not known")
        start = min(_common_start(content, other) for other in others)
        backwards = content[::-1]
        end = len(content) - min(_common_start(backwards, other[::-1]) for other in others)
        if end < start:
            return None
        return self._start_of_turn(messages[:index], content, start), self._end_of_turn(content, end)

    def _replaced(self, messages: Messages, index: int, fields: Mapping[str, object]) -> list[str] | None:
        """Return the texts with each stand-in and ``fields`` in place of a response; None if the template refuses them."""
        before, after = messages[:index], messages[index + 1 :]
        try:
            return [self._text([*before, {**fields, "content": each}, *after]) for each in STAND_INS]
        except REFUSALS:
            return None

    def _after_prompt(self, messages: Messages, index: int, content: str) -> tuple[int, int] | None:
        """Return the range between the texts of the conversation before and up to a response; None if it has other texts."""
        try:
            before = self._text(messages[:index], add_generation_prompt=True)
            up_to = self._text(messages[: index + 1])
        except REFUSALS:
            return None
        if not (up_to.startswith(before) and content.startswith(up_to)):
            return None
        # The white space after the token that ends a turn is the template's.
        stripped = up_to.rstrip()
        ends_turn = stripped.endswith(tuple(token for token in self.ends_of_turn if token))
        return len(before), len(stripped) if ends_turn else len(up_to)

    def _start_of_turn(self, before: Messages, content: str, start: int) -> int:
        """Return the position at which the model starts to write: after the prompt, if the text starts with the prompt.

        Between the two, a template may write text that the model has to write itself, such as the start of its thoughts.
        """
        if not before or "add_generation_prompt" not in self.template:
            return start
        try:
            prompt = self._text(before, add_generation_prompt=True)
        except REFUSALS:  # a template may require messages after these
            return start
        return len(prompt) if content.startswith(prompt) and len(prompt) <= start else start

    def _end_of_turn(self, content: str, end: int) -> int:
        """Return the end of the special token after a response, which the model writes to end its turn."""
        after = content[end:].lstrip()
        ending = max(
            (token for token in self.ends_of_turn if token and after.startswith(token)), key=len, default=""
        )
        return len(content) - len(after) + len(ending) if ending else end


def _refused(conversation: Conversation, error: Exception) -> ValueError:
    return ValueError(
        f"{conversation.place}: the model's chat template cannot write the conversation ({error}). Remove or correct the row."
    )


def _parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _common_start(one: str, other: str) -> int:
    """Return the length of the common start of two strings, by bisection: a loop over characters takes far longer."""
    shortest, longest = 0, min(len(one), len(other))
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        if one[shortest:middle] == other[shortest:middle]:
            shortest = middle
        else:
            longest = middle - 1
    return shortest
