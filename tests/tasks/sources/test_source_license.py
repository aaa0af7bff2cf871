"""The licence of the dense model is what its model card states."""

import pytest

from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.sources.source_license import License, license_of_card

LLAMA = """---
language:
- en
license: other
license_name: "Llama 3 Community"
license_link: https://example.org/LICENSE
---
# Llama
license: mit
"""


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model", License("apache-2.0")),
        ("---\r\nlicense: mit\r\n---\r\n", License("mit")),
        ("---\nlicense: 'mit'\n---\n", License("mit")),
        (LLAMA, License("other", "Llama 3 Community", "https://example.org/LICENSE")),
        (
            "---\nlicense: other\nlicense_link: LICENSE.md\n---\n",
            License("other"),
        ),  # the file is not copied
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nbase:\n  license: mit\n---\n", None),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("# A model\n\nlicense: mit\n", None),
        ("---\nlicense: mit\n", None),  # the YAML never ends
        ("", None),
    ],
)
def test_the_licence_is_read_from_the_yaml_of_the_card(card, expected):
    assert license_of_card(card) == expected


def test_an_import_records_the_licence(local_store, save_model):
    folder = save_model()
    (folder / "README.md").write_text(LLAMA)
    facts = import_checkpoint(local_store, str(folder)).artifact.facts
    assert License(**facts["license"]) == License("other", "Llama 3 Community", "https://example.org/LICENSE")


def test_an_import_from_the_hub_records_the_licence(local_store, hub):
    (hub.folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert import_checkpoint(local_store, "tiny/llama").artifact.facts["license"] == {"identifier": "mit"}


def test_an_import_of_a_model_without_a_card_records_no_licence(local_store, save_model):
    assert "license" not in import_checkpoint(local_store, str(save_model())).artifact.facts
