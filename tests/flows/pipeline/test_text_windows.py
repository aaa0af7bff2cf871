"""Text windows of a search, known before the model is imported."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from layerwise.flows.pipeline.text_windows import count_texts, open_corpora
from layerwise.flows.settings import Search
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.sample_tokens import token_stage

VOCABULARY = 11  # ten words, and <unk>


@pytest.fixture
def memory_store(tmp_path) -> ArtifactStore:
    return ArtifactStore(f"memory://{tmp_path.name}")


def load_tokenizer():
    backend = Tokenizer(WordLevel({"<unk>": 10} | {str(n): n for n in range(10)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def never():
    raise AssertionError("the tokenizer was loaded, although the text had been counted")


@pytest.fixture
def texts_of(tmp_path, memory_store):
    """Return a function that counts the texts of a search over a number of words."""

    def texts(words, load=load_tokenizer, vocabulary=VOCABULARY, **changes):
        file = tmp_path / f"{words}.txt"
        if not file.exists():
            file.write_text(" ".join(str(n % 10) for n in range(words)))
        text = {"calibration": str(file), "selection": str(file), "seqlen": 10}
        settings = Search(**{"model": "some/model", "sparsity": 0.5, **text, **changes})
        return count_texts(memory_store, settings, open_corpora(settings), "tokenizer", load, vocabulary)

    return texts


@pytest.mark.parametrize(
    ("words", "windows"),
    [
        (4000, {"calibration": 128, "selection": 64, "test": 100}),  # 200 and 100 fit
        (1000, {"calibration": 50, "selection": 25, "test": 25}),
        (80, {"calibration": 4, "selection": 2, "test": 2}),
    ],
)
def test_auto_is_the_usual_number_or_all_windows_that_fit(texts_of, words, windows):
    assert texts_of(words).windows == windows


def test_auto_gives_the_same_windows_as_the_number_that_it_stands_for(texts_of):
    def keys(texts):
        return {role: token_stage("tokenizer", request).key for role, request in texts.requests.items()}

    assert keys(texts_of(4000)) == keys(texts_of(4000, calibration_windows=128, selection_windows=64))
    assert keys(texts_of(1000)) == keys(texts_of(1000, calibration_windows=50, selection_windows=25))


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (
            76,
            {},
            r"for selection .* has 19 tokens, but 2 x 10 = 20 are needed. Use a longer text or shorter windows",
        ),
        (76, {"selection_windows": None}, r"for selection .* has 19 tokens, but 2 x 10 = 20 are needed"),
        (18, {}, r"for calibration .* has 9 tokens, but 1 x 10 = 10 are needed"),
        (
            80,
            {"test": "builtin", "seqlen": 30, "calibration_windows": 2},
            r"for calibration .* but 2 x 30 = 60",
        ),
        (
            1000,
            {"calibration_windows": 51},
            r"500 tokens, but 51 x 10 = 510 are needed.*fewer of them: 50 of 10",
        ),
        (1000, {"selection_windows": 26}, r"250 tokens, but 26 x 10 = 260 are needed"),
        (1000, {"test_windows": 26}, r"250 tokens, but 26 x 10 = 260 are needed"),
    ],
)
def test_a_text_that_is_too_short_is_refused_with_its_numbers(texts_of, words, changes, message):
    with pytest.raises(ValueError, match=message):
        texts_of(words, **changes)


def test_token_ids_without_a_row_in_the_embedding_are_refused(texts_of):
    # The tokenizer has an id 10 as well, but no word of the text gets it.
    assert texts_of(1000, vocabulary=10).windows["test"] == 25
    message = (
        "tokenizer of some/model makes token ids up to 9 of the text .*1000.txt, .* embedding has 9 rows"
    )
    with pytest.raises(ValueError, match=message):
        texts_of(1000, vocabulary=9)


def test_a_stored_count_is_reused_and_checked_for_every_model(texts_of, memory_store):
    texts_of(1000)
    assert list(memory_store.artifacts()) == []  # counting writes nothing
    texts_of(1000).keep(memory_store)
    assert texts_of(1000, load=never).windows == {"calibration": 50, "selection": 25, "test": 25}
    with pytest.raises(ValueError, match="embedding has 5 rows"):
        texts_of(1000, load=never, vocabulary=5)


@pytest.fixture
def mix_of(tmp_path, texts_of):
    """Return a function that counts the texts of a search with a mix of texts with different numbers of words."""

    def texts(mix, **changes):
        for words in (200, 400, 1000):
            (tmp_path / f"{words}.txt").write_text(" ".join(str(n % 10) for n in range(words)))
        return texts_of(400, calibration=mix.replace("file:", f"file:{tmp_path}/"), **changes)

    return texts


@pytest.mark.parametrize(
    ("mix", "windows", "shares"),
    [
        ("file:400.txt:3,file:1000.txt:7", "auto", [3, 7]),
        ("file:400.txt:3,file:1000.txt:7", 10, [3, 7]),
        ("file:400.txt,file:1000.txt,file:200.txt", 10, [4, 3, 3]),
        ("file:1000.txt,builtin", "auto", [64, 64]),
        ("file:1000.txt,file:200.txt", "auto", [21, 20]),  # 20 windows of the shorter text fit
    ],
)
def test_the_texts_of_a_mix_have_the_given_windows_or_equal_shares(mix_of, mix, windows, shares):
    texts = mix_of(mix, calibration_windows=windows, vocabulary=97)
    assert [source.windows for source in texts.requests["calibration"].sources] == shares
    assert texts.windows["calibration"] == sum(shares)


def test_a_text_of_a_mix_shares_no_tokens_with_the_same_selection_text(mix_of):
    texts = mix_of("file:1000.txt:8,file:400.txt:8")
    parts = [source.part for source in texts.requests["calibration"].sources]
    assert parts == [(0.0, 1.0), (0.0, 0.5)]  # the selection and the test text is 400.txt
    assert texts.requests["selection"].part == (0.5, 0.75)
    assert texts.overlapping_sample is None
    assert mix_of("file:1000.txt:8,file:400.txt:11").overlapping_sample.corpus.name == "400.txt"


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("file:1000.txt:8,file:400.txt:21", r"400.txt for calibration .* has 200 tokens, but 21 x 10 = 210"),
        ("file:1000.txt,file:none.txt", "there is no corpus at .*none.txt"),
        ("file:1000.txt:1,file:./1000.txt:2", "two texts of the calibration mix, .*, are the same text"),
        ("file:200.txt,file:*00.txt", r"calibration \(.*\) and selection .* both contain 400.txt"),
        ("file:200.txt,file:[12]*.txt", "two texts of the calibration mix, .* both contain 200.txt"),
        ("file:1000.txt:1,200.txt:1", r"1000.txt:1,200.txt:1. is not a corpus.*A mix of texts .* file: before every"),
        ("c4:64", r"'c4:64' is not a corpus.*A mix of texts has at least two of them"),
    ],
)  # fmt: skip
def test_a_mix_that_cannot_work_is_refused(mix_of, mix, message):
    with pytest.raises((ValueError, OSError), match=message):
        mix_of(mix)


def test_a_value_that_is_a_mix_and_a_folder_is_refused_with_both_ways_to_write_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4,ptb").mkdir()
    (tmp_path / "c4,ptb" / "a.txt").write_text("words")
    settings = Search(model="some/model", sparsity=0.5, calibration="c4,ptb")
    with pytest.raises(ValueError, match=r"write './c4,ptb'; for the mix, write a space after each comma"):
        open_corpora(settings)
    as_folder = settings.model_copy(update={"calibration": "./c4,ptb"})
    assert open_corpora(as_folder)["calibration"][0].label == "./c4,ptb"


def test_samples_overlap_if_they_take_more_than_half_of_the_windows(texts_of):
    assert texts_of(1000).overlapping_sample is not None
    assert texts_of(1000, calibration_windows=26).overlapping_sample is not None
    assert texts_of(1000, calibration_windows=25).overlapping_sample is None
