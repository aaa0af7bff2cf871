"""Counting the tokens of a corpus, once."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from layerwise.tasks.count_tokens import TokenCount, count_tokens, find_count, keep_count
from layerwise.tasks.texts.corpora import open_corpus

IDENTITY = "0123456789abcdef"


def load_tokenizer():
    """Three words, of which the last has the id 9, and <s> (id 12) before every text."""
    backend = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 9, "<s>": 12}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 12)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("a b a c")
    return open_corpus(str(tmp_path / "a.txt"), "test")


def test_special_tokens_count_and_theirs_may_be_the_largest_id(corpus):
    assert count_tokens(corpus, load_tokenizer) == TokenCount(tokens=5, largest_id=12, truncated=False)


def test_ids_that_the_text_does_not_use_do_not_matter(tmp_path):
    (tmp_path / "a.txt").write_text("a b")
    tokenizer = load_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    corpus = open_corpus(str(tmp_path / "a.txt"), "test")
    assert count_tokens(corpus, lambda: tokenizer).largest_id == 2


def test_a_kept_count_is_found_for_the_same_text_and_tokenizer_only(store, corpus, tmp_path):
    count = count_tokens(corpus, load_tokenizer)
    assert find_count(store, IDENTITY, corpus) is None
    for _ in range(2):
        keep_count(store, IDENTITY, corpus, count)
    assert find_count(store, IDENTITY, corpus) == count
    assert find_count(store, "another tokenizer", corpus) is None
    (tmp_path / "a.txt").write_text("a b a b")
    assert find_count(store, IDENTITY, open_corpus(str(tmp_path / "a.txt"), "test")) is None
    assert [artifact.recipe["name"] for artifact in store.artifacts()] == ["count_tokens"]
