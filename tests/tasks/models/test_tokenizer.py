"""Tokenizer: equal before and after an import; refused in one line if it cannot be opened."""

import json
import sys

import pytest

from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.models.tokenizer import open_tokenizer, tokenizer_of_source
from tests.small_search import small_search


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
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    (files / "tokenizer.json").unlink()
    (files / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.model.*pip install {package}"):
        open_tokenizer(files, "the model")


@pytest.fixture
def sources(save_model, hub, tmp_path) -> dict[str, str]:
    """Return a model of each kind of source."""
    gguf = small_search(tmp_path / "gguf", layers=1)["model"]
    return {"folder": str(save_model()), "hub": "tiny/llama", "gguf": str(gguf)}


@pytest.mark.parametrize("kind", ["folder", "hub", "gguf"])
def test_the_tokenizer_of_a_source_equals_that_of_the_imported_model(local_store, sources, kind):
    before = tokenizer_of_source(sources[kind])
    checkpoint = import_checkpoint(local_store, sources[kind])
    assert before.identity == checkpoint.tokenizer_identity
    assert before.encoding_identity == checkpoint.encoding_identity
    text = "hello world abab"
    assert before.load()(text)["input_ids"] == checkpoint.tokenizer()(text)["input_ids"]


def test_the_tokenizer_of_a_hub_model_is_read_without_its_weights(sources, hub):
    """One byte of one shard is requested, because a gated repository refuses only then."""
    tokenizer_of_source(sources["hub"])
    weights = [request for request in hub.requests if "safetensors" in request and request.startswith("GET")]
    assert len(weights) == 1


def test_the_identity_changes_with_the_tokenizer_but_not_with_the_configuration(save_model, edit_config):
    folder = save_model()
    before = tokenizer_of_source(str(folder)).identity
    edit_config(folder, rope_theta=1.0)
    assert tokenizer_of_source(str(folder)).identity == before
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert tokenizer_of_source(str(folder)).identity != before


def test_a_model_without_a_tokenizer_is_refused_by_name(save_model):
    folder = save_model()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="model has no tokenizer"):
        tokenizer_of_source(str(folder)).load()


def test_the_encoding_identity_changes_with_the_type_of_the_model(save_model, edit_config):
    """transformers chooses the class by the type: with Qwen2's configuration some texts get other ids."""
    folder = save_model()
    before = tokenizer_of_source(str(folder))
    edit_config(folder, model_type="qwen2")
    after = tokenizer_of_source(str(folder))
    assert after.identity == before.identity
    assert after.encoding_identity != before.encoding_identity
