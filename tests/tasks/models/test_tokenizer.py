"""Tokenizers that cannot be opened end in one line that says which file, and what to do."""

import json
import sys

import pytest

from layerwise.tasks.models.tokenizer import open_tokenizer


@pytest.fixture
def files(save_model):
    return save_model()


def test_the_tokenizer_of_a_folder_is_opened(files):
    assert open_tokenizer(files, "the model")("hello big world")["input_ids"] == [1, 0, 2]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"[]", b"5", b"\xff\xfe\x00" * 9, b"[" * 100_000 + b"]" * 100_000],
    ids=["empty", "text", "list", "number", "binary", "deep"],
)
def test_a_damaged_file_is_refused_in_one_line(files, file, content):
    (files / file).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"the model has no tokenizer that transformers can open \("
    ) as refused:
        open_tokenizer(files, "the model")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": "1"}, "unk_token": "a"}}),
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}),
        ("tokenizer.json", {"model": {"type": "Unheard"}}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer.json", {"added_tokens": [{"id": "x"}]}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 5}}),
        ("tokenizer_config.json", {"bos_token": 5}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_of_the_wrong_kind_is_refused_in_one_line(files, file, changes):
    document = json.loads((files / file).read_text())
    (files / file).write_text(json.dumps(document | changes))
    with pytest.raises(ValueError, match="the model has no tokenizer that transformers can open") as refused:
        open_tokenizer(files, "the model")
    assert "\n" not in str(refused.value)


def test_code_that_comes_with_a_tokenizer_is_not_run(files):
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (files / "tokenizer.json").unlink()
    (files / "tokenizer_config.json").write_text(json.dumps(own))
    (files / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="code that comes with it, which is never run"):
        open_tokenizer(files, "the model")


@pytest.mark.parametrize(
    ("content", "package"), [(b"\n\x0e\n\x05<unk>", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")]
)
def test_a_package_that_is_not_installed_is_named(files, monkeypatch, content, package):
    monkeypatch.setitem(sys.modules, package, None)  # as an import finds it if it is not installed
    (files / "tokenizer.json").unlink()
    (files / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.model.*pip install {package}"):
        open_tokenizer(files, "the model")
