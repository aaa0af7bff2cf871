"""Prompts of a corpus, and the rows with their responses."""

import json

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from layerwise.tasks.generation.prompts import Prompt, prompts_identity, read_prompts
from layerwise.tasks.texts.corpora import open_corpus


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that writes spaces as part of the next word, as those of Llama 2 and Mistral."""
    backend = Tokenizer(WordLevel({"<unk>": 0, "▁one": 1, "▁two": 2, "s": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture
def corpus_of(tmp_path):
    def corpus(*texts):
        (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return open_corpus(str(tmp_path / "texts.jsonl"), "calibration")

    return corpus


def test_a_continued_text_keeps_the_space_before_the_response(corpus_of, tokenizer):
    (prompt,) = read_prompts(corpus_of("one"), tokenizer, None, None)
    assert prompt.with_response([2, 1], tokenizer) == {"text": "one two one"}
    assert prompt.with_response([3, 1], tokenizer) == {"text": "ones one"}


def test_reading_stops_with_a_warning_after_a_number_of_characters(corpus_of, tokenizer, caplog):
    corpus = corpus_of("one", "two", "one two")
    assert [each.text for each in read_prompts(corpus, tokenizer, None, None, limit=9)] == ["one", "two"]
    assert "more than 9 characters, the maximum: only its first 2 rows are read" in caplog.text
    caplog.clear()
    assert len(read_prompts(corpus, tokenizer, 2, None, limit=9)) == 2
    assert caplog.text == ""


def test_the_identity_of_prompts_has_all_fields_of_their_messages():
    def identity(**fields):
        return prompts_identity([Prompt([{"role": "user", "content": "one", **fields}], "one", (1,))])

    assert identity() != identity(name="Ann")
