"""Types of models that transformers has, by tiny random ones. ``docs/make_model_types.py --check`` tries all of them."""

import re
from pathlib import Path

import pytest
import transformers

from layerwise.models.skeleton import UnsupportedModel, auto_class
from layerwise.tasks.import_checkpoint import inspect_source
from tests.model_types import compare
from tests.tiny_configs import model_types, tiny_config

PAGE = Path(__file__).parents[3] / "docs" / "model-types.md"


@pytest.mark.parametrize(
    "model_type",
    [
        "bamba",  # Mamba-2 and attention
        "git",  # an encoder outside of the language model, with as many layers
        "granite_speech",  # an encoder whose name does not say so
        "recurrent_gemma",  # RG-LRU
        "xlstm",  # layers that return their state as well
        "zamba2",  # layers that share weights, and receive the embedded tokens
    ],
)
def test_a_tiny_model_of_the_type_is_pruned_as_by_hand(tmp_path, model_type):
    assert compare(model_type, tmp_path).result == "equal"


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mllama", r"mllama calls 2 of its 4 layers in [\w.]+ for text alone"),
        ("kosmos-2", "kosmos-2 cannot be run on text alone .*pixel_values"),
        ("blt", "blt has no number of decoder layers"),
    ],
)
def test_a_model_that_cannot_be_streamed_is_refused_before_the_import(tmp_path, model_type, reason):
    config = tiny_config(model_type)
    getattr(transformers, auto_class(config)).from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason):
        inspect_source(str(tmp_path))


def test_the_page_has_every_type_of_transformers():
    text = PAGE.read_text()
    version = re.search(r"of transformers (\S+),", text)
    assert version
    if version[1] != transformers.__version__:
        pytest.skip(f"the page was made with transformers {version[1]}")
    assert re.findall(r"^\| `([\w.-]+)` \|", text, re.MULTILINE) == model_types()
