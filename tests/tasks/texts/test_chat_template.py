"""Conversations: rows of chat data sets, their text by the tokenizer's chat template, and the tokens of the responses."""

import json
import time

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from layerwise.tasks.texts.chat_template import ChatTemplate
from layerwise.tasks.texts.corpora import open_corpus
from layerwise.tasks.texts.documents import Conversation
from layerwise.tasks.texts.token_stream import tokenise_corpus

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
# As Llama 2: the content is trimmed, and there is no prompt for a response.
TRIMMED = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Qwen 3: thoughts stay in the last response only, which gets empty ones if it has none.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% if loop.last %}{{ '<think>' + (message.thoughts or '') + '</think>' }}{% endif %}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
# As Alpaca: no special tokens, so a response ends with its content.
PLAIN = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n\n' }}{% endfor %}"
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user has to begin') }}{% endif %}" + PLAIN
)
# As SmolVLM: contents are lists of parts.
PARTS = CHATML.replace(
    "message.content + '<|im_end|>\n' }}",
    "''}}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}",
)
# As LLaVA: marked as well.
MARKED_PARTS = MARKED.replace(
    "{{ message.content + '<|im_end|>' }}",
    "{% for part in message.content %}{{ part.text }}{% endfor %}{{ '<|im_end|>' }}",
)
# As Mistral: the result of a tool may only follow a tool call, whose content is left out.
TOOLS = (
    "{% for message in messages %}{% if message.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('a result without a call') }}{% endif %}"
    "{{ '[' + message.role + ']' + (message.tool_calls | string if message.tool_calls else message.content) }}"
    "{% if message.role == 'assistant' %}{{ eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML
TWICE = "{{ messages[-1].content }}" + CHATML

# The content of one response contains a whole turn and begins like another text that the model might write.
TWO_TURNS = [
    {"role": "user", "content": "Apple pie or Banana split?"},
    {"role": "assistant", "content": " Apple pie.<|im_end|>\n<|im_start|>user\nYes \n", "thoughts": "pie"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "It is \U0001f967.", "thoughts": "pie!"},
]
FIRST = " Apple pie.<|im_end|>\n<|im_start|>user\nYes \n"


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer, as those of GPT-2, Llama 3 and Qwen."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    trainer = BpeTrainer(
        special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([json.dumps(TWO_TURNS), "user assistant Why? It is"] * 2, trainer)
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture
def stream_of(tokenizer, tmp_path):
    """Return a function that tokenises rows of JSON lines with a chat template."""

    def stream(template, *rows):
        (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tokenizer.chat_template = template
        return tokenise_corpus(open_corpus(str(tmp_path / "chat.jsonl"), "calibration"), tokenizer)

    return stream


def responses_in(stream, tokenizer):
    """Return the text of every run of marked tokens."""
    runs, before = [], False
    for token, marked in zip(stream.token_ids.tolist(), stream.responses.tolist(), strict=True):
        if marked and not before:
            runs.append([])
        if marked:
            runs[-1].append(token)
        before = marked
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "responses"),
    [
        (CHATML, [f"{FIRST}<|im_end|>", "It is \U0001f967.<|im_end|>"]),
        (MARKED, [f"{FIRST}<|im_end|>", "It is \U0001f967.<|im_end|>"]),
        (TRIMMED, [f" {FIRST.strip()} <|im_end|>", " It is \U0001f967. <|im_end|>"]),
        (THINKING, [f"{FIRST}<|im_end|>", "<think>pie!</think>It is \U0001f967.<|im_end|>"]),
        (PLAIN, [FIRST, " It is \U0001f967."]),
        (PARTS, [f"{FIRST}<|im_end|>", "It is \U0001f967.<|im_end|>"]),
        (MARKED_PARTS, [f"{FIRST}<|im_end|>", "It is \U0001f967.<|im_end|>"]),
    ],
)
def test_the_tokens_of_responses_are_those_that_the_model_writes(stream_of, tokenizer, template, responses):
    stream = stream_of(template, {"messages": TWO_TURNS})
    found = responses_in(stream, tokenizer)
    assert [text.removeprefix(" ") for text in found] == [text.removeprefix(" ") for text in responses]
    assert not stream.responses[0]


def test_conversations_are_packed_as_the_tokenizer_writes_each_of_them(stream_of, tokenizer):
    question, answer = TWO_TURNS[2:]
    rows = [
        {"messages": TWO_TURNS, "prompt": "ignored"},
        {"prompt": question["content"], "completion": answer["content"]},
        {"prompt": TWO_TURNS[:3], "response": [answer]},
        {"conversations": [question, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, answer]},
    ]  # fmt: skip
    stream = stream_of(
        CHATML.replace("message.content", "(message.content or message.tool_calls|string)"), *rows
    )
    plain = [question, {"role": "assistant", "content": answer["content"]}]
    whole = [TWO_TURNS, plain, TWO_TURNS, rows[3]["conversations"]]
    written = [tokenizer.apply_chat_template(each, return_dict=False) for each in whole]
    assert stream.token_ids.tolist() == sum(written, [])
    assert (stream.conversations, stream.truncated) == (4, False)
    assert len(responses_in(stream, tokenizer)) == 7


def test_contents_are_strings_or_lists_of_parts_as_the_template_reads_them(stream_of):
    parts = [each | {"content": [{"type": "text", "text": each["content"]}]} for each in TWO_TURNS]
    as_strings = stream_of(CHATML, {"messages": TWO_TURNS})
    for messages in (TWO_TURNS, parts):
        as_parts = stream_of(PARTS, {"messages": messages})
        assert as_parts.token_ids.tolist() == as_strings.token_ids.tolist()
        assert as_parts.responses.tolist() == as_strings.responses.tolist()


def test_a_tool_call_that_cannot_be_replaced_by_text_is_a_response(stream_of, tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    messages = [TWO_TURNS[0], call, {"role": "tool", "content": "7"}, TWO_TURNS[3]]
    stream = stream_of(TOOLS, {"messages": messages})
    assert responses_in(stream, tokenizer) == ["[{'name': 'f'}]<|im_end|>", "It is \U0001f967.<|im_end|>"]


def test_responses_of_a_long_conversation_are_found_fast(tokenizer):
    tokenizer.chat_template = CHATML
    conversation = Conversation(
        tuple({"role": each["role"], "content": 1000 * "w "} for _ in range(100) for each in TWO_TURNS),
        "row 1",
    )
    began = time.process_time()
    text = ChatTemplate(tokenizer, "chat").write(conversation)
    assert len(text.responses) == 200
    assert time.process_time() - began < 10  # about 2 s; a loop over the characters takes 20 s


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(stream_of, tokenizer):
    stream = stream_of(DATED, {"messages": TWO_TURNS})
    assert tokenizer.decode(stream.token_ids[:12]).startswith("26 Jul 2024\n")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, TWO_TURNS, "contains conversations, but the model's tokenizer has no chat template.*-Instruct"),
        ({"rag": CHATML}, TWO_TURNS, "the model's chat template is not known.*Name one of the templates 'default'"),
        (STRICT, TWO_TURNS[1:], "row 1: the model's chat template cannot write the .*the user has to begin"),
        (CHATML, [{"role": "user", "content": ["x"]}], "row 1: the model's chat template cannot write"),
        (TWICE, TWO_TURNS, "row 1: .* writes a response more than once"),
        (CHATML + "{{ 1 // (messages | length - 4) }}", TWO_TURNS, "row 1: .*cannot write.* by zero"),
        (CHATML + "{% macro f() %}{{ f() }}{% endmacro %}{{ f() if messages | length > 3 }}", TWO_TURNS, "row 1: .*recursion"),
        (CHATML + "{% if %}", TWO_TURNS, r"^the model's chat template has an error in line \d: Expected an expression"),
        ("Hello.", TWO_TURNS, "does not write a message of the user.* leaves out the content"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_written_are_refused(stream_of, template, messages, message):
    with pytest.raises(ValueError, match=message):
        stream_of(template, {"messages": messages})
