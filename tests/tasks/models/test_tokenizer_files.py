"""The tokenizer of a model before it is imported: the same as afterwards, so that keys are."""

import pytest

from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.models.tokenizer_files import tokenizer_of_source
from tests.small_search import small_search


@pytest.fixture
def sources(save_model, hub, tmp_path) -> dict[str, str]:
    """A model of each kind."""
    gguf = small_search(tmp_path / "gguf", layers=1)["model"]
    return {"folder": str(save_model()), "hub": "tiny/llama", "gguf": str(gguf)}


@pytest.mark.parametrize("kind", ["folder", "hub", "gguf"])
def test_the_tokenizer_of_a_source_is_that_of_the_imported_model(local_store, sources, kind):
    before = tokenizer_of_source(sources[kind])
    checkpoint = import_checkpoint(local_store, sources[kind])
    assert before.identity == checkpoint.tokenizer_identity
    assert before.encoding_identity == checkpoint.encoding_identity
    text = "hello world abab"
    assert before.load()(text)["input_ids"] == checkpoint.tokenizer()(text)["input_ids"]


def test_the_tokenizer_of_a_hub_model_is_had_without_its_weights(sources, hub):
    """Of one shard a byte is asked for, as a gated repository refuses only then."""
    tokenizer_of_source(sources["hub"])
    weights = [request for request in hub.requests if "safetensors" in request and request.startswith("GET")]
    assert len(weights) == 1


def test_a_changed_tokenizer_has_another_identity_and_a_changed_configuration_has_not(
    save_model, edit_config
):
    folder = save_model()
    before = tokenizer_of_source(str(folder)).identity
    edit_config(folder, rope_theta=1.0)
    assert tokenizer_of_source(str(folder)).identity == before
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert tokenizer_of_source(str(folder)).identity != before


def test_a_model_without_a_tokenizer_is_refused_by_its_name(save_model):
    folder = save_model()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="model has no tokenizer"):
        tokenizer_of_source(str(folder)).load()


def test_the_same_files_of_another_type_of_model_are_another_tokenizer(save_model, edit_config):
    """transformers chooses the class by the type: next to Qwen2's configuration some texts get other ids."""
    folder = save_model()
    before = tokenizer_of_source(str(folder))
    edit_config(folder, model_type="qwen2")
    after = tokenizer_of_source(str(folder))
    assert after.identity == before.identity
    assert after.encoding_identity != before.encoding_identity
