"""Sample tokens: token windows and token counts of a corpus."""

import json
import logging
import re

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors
from layerwise.tasks.sample_tokens import (
    MixRequest,
    TokenCount,
    TokenRequest,
    count_tokens,
    find_count,
    keep_count,
    sample_tokens,
    token_stage,
)
from layerwise.tasks.texts.corpora import assign_parts, open_corpus
from layerwise.tasks.texts.token_windows import TOKENS_FILE, read_input_ids

IDENTITY = "0123456789abcdef"


def tiny_tokenizer(words, bos=False, **options):
    """Return a tokenizer with one token per word: word ``w7`` has id 7; <unk> and <s> have the ids after the words."""
    vocabulary = {f"w{number}": number for number in range(words)} | {"<unk>": words, "<s>": words + 1}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words + 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", model_max_length=16, **options
    )


def numbered_words(count, start=0):
    """Return a text in which every word occurs once, so that a token id identifies its position."""
    return " ".join(f"w{number}" for number in range(start, start + count))


@pytest.fixture
def words_100(tmp_path):
    """Open a corpus of a hundred different words."""
    (tmp_path / "words.txt").write_text(numbered_words(100))
    return open_corpus(str(tmp_path / "words.txt"), "test")


def sample(store, request, words=100, **options):
    return sample_tokens(store, lambda: tiny_tokenizer(words, **options), IDENTITY, request)


def never():
    raise AssertionError("the tokenizer was loaded, although the windows are in the store")


def test_scoring_uses_consecutive_windows_and_drops_the_tail(store, words_100):
    artifact = sample(store, TokenRequest("test", words_100, windows=None, seqlen=30))
    assert read_input_ids(store, artifact).tolist() == torch.arange(90).reshape(3, 30).tolist()
    assert read_input_ids(store, artifact).dtype == torch.int64


def test_documents_are_tokenised_as_one_text(store, tmp_path):
    lines = [json.dumps({"text": numbered_words(5, start)}) for start in (0, 5, 10)]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    request = TokenRequest("selection", open_corpus(str(tmp_path / "words.jsonl"), "selection"), 2, seqlen=6)
    assert read_input_ids(store, sample(store, request)).tolist() == torch.arange(12).reshape(2, 6).tolist()


def test_windows_in_the_store_need_neither_tokenizer_nor_text(store, tmp_path, words_100):
    request = TokenRequest("test", words_100, windows=2, seqlen=10)
    built = sample(store, request)
    (tmp_path / "words.txt").unlink()
    assert sample_tokens(store, never, IDENTITY, request) == built


def test_looking_up_windows_builds_nothing(store, words_100):
    request = TokenRequest("test", words_100, windows=2, seqlen=10)
    assert store.find(token_stage(IDENTITY, request)) is None
    assert store.find(token_stage(IDENTITY, request)) is None
    assert sample(store, request) == store.find(token_stage(IDENTITY, request))


def test_the_three_parts_of_one_corpus_do_not_overlap(store, tmp_path):
    (tmp_path / "words.txt").write_text(numbered_words(997))
    roles = ("calibration", "selection", "test")
    corpora = {role: open_corpus(str(tmp_path / "words.txt"), role) for role in roles}
    parts = assign_parts(corpora)
    windows = {"calibration": 62, "selection": 31, "test": 31}
    tokens = {}
    for role in roles:
        seed = 3 if role == "calibration" else None
        request = TokenRequest(role, corpora[role], windows[role], seqlen=8, part=parts[role], seed=seed)
        tokens[role] = set(read_input_ids(store, sample(store, request, words=997)).flatten().tolist())
        assert len(tokens[role]) == windows[role] * 8
    assert not tokens["calibration"] & tokens["selection"]
    assert not tokens["calibration"] & tokens["test"]
    assert not tokens["selection"] & tokens["test"]


def test_calibration_windows_follow_their_seed(store, words_100):
    def calibration(seed):
        return sample(store, TokenRequest("calibration", words_100, windows=4, seqlen=8, seed=seed))

    assert calibration(1).content != calibration(2).content
    other = ArtifactStore("memory://another-store-with-the-same-seed")
    repeated = sample(other, TokenRequest("calibration", words_100, windows=4, seqlen=8, seed=1))
    assert repeated.content == calibration(1).content
    assert repeated.key == calibration(1).key


def test_a_mix_has_the_windows_of_every_text_evenly_spread_and_the_mask_of_its_responses(
    store, tmp_path, words_100
):
    rows = [
        {"prompt": numbered_words(4, start), "response": numbered_words(4, start + 4)}
        for start in range(0, 80, 8)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = open_corpus(str(tmp_path / "chat.jsonl"), "calibration")
    sources = [
        TokenRequest("calibration", corpus, windows, 8, seed=1)
        for corpus, windows in ((words_100, 4), (chat, 2))
    ]
    template = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
    options = {"words": 100, "chat_template": template}
    mix = sample(store, MixRequest(tuple(sources)), **options)
    alone = [sample_tokens(store, never, IDENTITY, source) for source in sources]
    tensors = read_tensors(store, mix, TOKENS_FILE)
    texts = [read_input_ids(store, artifact) for artifact in alone]
    from_chat = [1, 4]
    assert tensors["input_ids"][from_chat].equal(texts[1])
    assert tensors["input_ids"][[0, 2, 3, 5]].equal(texts[0])
    is_response = tensors["input_ids"] % 8 >= 4
    is_response[[0, 2, 3, 5]] = False
    assert tensors["responses"].equal(is_response)
    assert alone[1].facts["response_tokens"] == 8
    assert mix.facts["sources"] == [artifact.facts for artifact in alone]
    assert (mix.facts["windows"], mix.facts["seqlen"]) == (6, 8)
    assert sample_tokens(store, never, IDENTITY, MixRequest(tuple(sources))) == mix
    assert MixRequest(tuple(sources)).with_windows(3).counts == [2, 1]
    with pytest.raises(ValueError, match=r"1 windows are too few .* none of .*chat.jsonl"):
        MixRequest(tuple(sources)).with_windows(1)


def test_the_same_text_in_another_file_has_another_key_but_equal_content(store, tmp_path, words_100):
    (tmp_path / "copy.txt").write_text(numbered_words(100))
    copy = open_corpus(str(tmp_path / "copy.txt"), "test")
    first, second = (sample(store, TokenRequest("test", corpus, 3, 8)) for corpus in (words_100, copy))
    assert first.key != second.key
    assert first.content == second.content


def test_every_setting_and_the_tokenizer_are_part_of_the_key(words_100):
    requests = [
        TokenRequest("test", words_100, 2, 8),
        TokenRequest("selection", words_100, 2, 8),
        TokenRequest("test", words_100, 3, 8),
        TokenRequest("test", words_100, None, 8),
        TokenRequest("test", words_100, 2, 9),
        TokenRequest("test", words_100, 2, 8, part=(0.5, 1.0)),
        TokenRequest("test", open_corpus("builtin", "test"), 2, 8),
        TokenRequest("calibration", words_100, 2, 8, seed=0),
        TokenRequest("calibration", words_100, 2, 8, seed=1),
    ]
    keys = {token_stage(IDENTITY, request).key for request in requests}
    assert len(keys) == len(requests)
    assert token_stage("another tokenizer", requests[0]).key not in keys


def test_the_recipe_does_not_contain_a_path(words_100, tmp_path):
    recipe = token_stage(IDENTITY, TokenRequest("test", words_100, 2, 8)).recipe
    assert str(tmp_path) not in json.dumps(recipe)
    assert "words.txt" in json.dumps(recipe)


def test_facts_describe_the_text(store, words_100):
    facts = sample(store, TokenRequest("test", words_100, 2, 8, part=(0.5, 1.0))).facts
    assert facts["corpus"].endswith("words.txt")
    assert re.fullmatch("[0-9a-f]{64}", facts["text_sha256"])
    expected = {
        "role": "test",
        "characters": len(numbered_words(100)),
        "truncated": False,
        "text_tokens": 100,
        "part_tokens": [50, 100],
        "windows": 2,
        "seqlen": 8,
        "text_starts_with_bos": False,
    }
    assert {name: facts[name] for name in expected} == expected


def test_the_text_has_one_bos_at_its_start_and_windows_have_none_of_their_own(store, words_100):
    artifact = sample(store, TokenRequest("test", words_100, None, 10), bos=True)
    input_ids = read_input_ids(store, artifact)
    assert input_ids.flatten().tolist() == [101, *range(99)]
    assert artifact.facts["text_starts_with_bos"] is True
    assert artifact.facts["text_tokens"] == 101


def test_truncation_and_padding_of_a_tokenizer_are_disabled(store, words_100):
    tokenizer = tiny_tokenizer(100)
    tokenizer.backend_tokenizer.enable_truncation(max_length=16)
    tokenizer.backend_tokenizer.enable_padding(length=512)
    artifact = sample_tokens(store, lambda: tokenizer, IDENTITY, TokenRequest("test", words_100, None, 10))
    assert artifact.facts["text_tokens"] == 100


def test_a_text_longer_than_the_context_of_the_model_gives_no_warning(store, words_100, caplog):
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)  # it does not propagate to the root logger
    try:
        sample(store, TokenRequest("test", words_100, None, 10))
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert "longer than" not in caplog.text


def test_a_text_that_is_too_short_is_refused_with_the_number_of_tokens_needed(store, words_100):
    message = r"words.txt for calibration \(tokens 0 to 50 of 100\) has 50 tokens, but 7 x 8 = 56 are needed"
    request = TokenRequest("calibration", words_100, 7, 8, part=(0.0, 0.5), seed=0)
    with pytest.raises(ValueError, match=message):
        sample(store, request)
    assert store.find(token_stage(IDENTITY, request)) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"role": "training"}, "unknown role 'training'"),
        ({"seqlen": 1}, "windows of 1 tokens"),
        ({"windows": 0}, "0 windows were requested"),
        ({"part": (0.5, 0.5)}, "0.5 to 0.5 is not a valid part of"),
        ({"part": (-0.1, 0.5)}, "0 <= start < end <= 1"),
        ({"part": (0.5, 1.1)}, "0 <= start < end <= 1"),
        ({"seed": 1}, "test windows are not random, but the seed is 1"),
        ({"role": "calibration"}, "need a seed, not None"),
        ({"role": "calibration", "seed": -1}, "need a seed, not -1"),
        ({"role": "calibration", "seed": 0, "windows": None}, "windows is None"),
    ],
)
def test_an_invalid_request_is_refused(values, message):
    builtin = open_corpus("builtin", "test")
    with pytest.raises(ValueError, match=message):
        TokenRequest(**({"role": "test", "corpus": builtin, "windows": 2, "seqlen": 8} | values))


def load_tokenizer():
    """Return a tokenizer for three words, the last with id 9, that puts <s> (id 12) before every text."""
    backend = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 9, "<s>": 12}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 12)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("a b a c")
    return open_corpus(str(tmp_path / "a.txt"), "test")


def test_special_tokens_are_counted_and_may_have_the_largest_id(corpus):
    assert count_tokens(corpus, load_tokenizer) == TokenCount(tokens=5, largest_id=12, truncated=False)


def test_ids_that_do_not_occur_in_the_text_are_ignored(tmp_path):
    (tmp_path / "a.txt").write_text("a b")
    tokenizer = load_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    corpus = open_corpus(str(tmp_path / "a.txt"), "test")
    assert count_tokens(corpus, lambda: tokenizer).largest_id == 2


def test_a_count_is_found_only_for_the_same_text_and_tokenizer(store, corpus, tmp_path):
    count = count_tokens(corpus, load_tokenizer)
    assert find_count(store, IDENTITY, corpus) is None
    for _ in range(2):
        keep_count(store, IDENTITY, corpus, count)
    assert find_count(store, IDENTITY, corpus) == count
    assert find_count(store, "another tokenizer", corpus) is None
    (tmp_path / "a.txt").write_text("a b a b")
    assert find_count(store, IDENTITY, open_corpus(str(tmp_path / "a.txt"), "test")) is None
    assert [artifact.recipe["name"] for artifact in store.artifacts()] == ["count_tokens"]
