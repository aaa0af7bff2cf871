"""The model card: its metadata for the hub, and its text for people."""

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard
from markdown_it import MarkdownIt

from layerwise.tasks.pages.model_card import ModelCard, Result, model_card
from layerwise.tasks.sources.source_license import License

CARD = ModelCard(
    base_model="owner/name@0123abc",
    license=License("apache-2.0"),
    pruner="wanda",
    pattern=None,
    allocator="atp",
    layers=(0.4, 0.5, 0.6),
    realised=0.5,
    results=(
        Result("dense", "test text", 40, 2048, 5.47),
        Result("**this model**", "test text", 40, 2048, 7.123),
    ),
)


def test_the_hub_reads_base_model_licence_and_tags():
    data = HubCard(model_card(CARD, "dense")).data
    assert data.base_model == "owner/name"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["pruning", "sparsity", "layerwise", "atp", "wanda"]


def test_a_licence_without_an_identifier_has_a_name_and_a_link():
    card = replace(CARD, license=License("other", 'the "new" one: 3', "https://example.org/text"))
    data = HubCard(model_card(card, "dense")).data
    assert (data.license, data.license_name) == ("other", 'the "new" one: 3')
    assert data.license_link == "https://example.org/text"


def test_unknown_facts_are_omitted():
    card = replace(CARD, base_model="model", license=None, allocator=None, results=())
    text = model_card(card, "dense")
    data = HubCard(text).data
    assert data.base_model is None
    assert data.license is None
    assert "atp" not in data.tags
    assert "## Results" not in text
    assert "do not state which one" in text


def test_the_card_of_a_compressed_folder_does_not_name_transformers():
    text = model_card(CARD, "compressed")
    assert HubCard(text).data.library_name is None
    assert "from_pretrained" not in text
    assert 'load("path/to/this/folder")' in text


def test_the_text_has_the_plan_the_results_and_the_citation():
    text = model_card(replace(CARD, pattern="2:4"), "dense")
    assert "# owner/name@0123abc, 50.0 % sparse" in text
    assert "one-shot pruning with wanda in the pattern 2:4" in text
    assert "set by the allocator atp, from 40.0 % to 60.0 %" in text
    assert "| 0 | 40.00 |\n| 1 | 50.00 |\n| 2 | 60.00 |\n" in text
    assert (
        "| dense | test text | 40 x 2048 | 5.47 |\n| **this model** | test text | 40 x 2048 | 7.12 |\n"
        in text
    )
    assert "applies: apache-2.0." in text
    assert "arXiv:2502.14770" in text
    assert (
        "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective" in text
    )


def test_a_huge_perplexity_is_shown_in_scientific_notation():
    card = replace(CARD, results=(Result("uniform", "test text", 40, 2048, 1e304),))
    assert "| uniform | test text | 40 x 2048 | 1.0e+304 |" in model_card(card, "dense")


@pytest.mark.parametrize("changes", [{"layers": ()}, {"layers": (1.5,)}, {"realised": -0.1}])
def test_invalid_sparsities_are_refused(changes):
    with pytest.raises(ValueError, match="the model card of owner/name@0123abc"):
        replace(CARD, **changes)


NASTY = [
    'x"><script>alert(1)</script>',
    "a|b",
    "---\nlicense: mit\n---\n# other",
    "`x` ``y``\n\n- z",
    "[a](b) <i>",
]


@pytest.mark.parametrize("form", ["dense", "compressed"])
@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_markup_in_names_and_licences_is_escaped(name, form):
    """The front matter has the same entries as with plain names, and the text has the same elements."""
    license = License(f"other {name}", f"name {name}", f"https://example.org/{name}")
    nasty = model_card(replace(CARD, base_model=name, license=license), form)
    tame = model_card(replace(CARD, base_model="model", license=License("other", "name", "https://a")), form)
    (_, front, body), (_, tame_front, tame_body) = (text.split("---\n", 2) for text in (nasty, tame))
    found, expected = yaml.safe_load(front), yaml.safe_load(tame_front)
    flat = " ".join(name.split())
    assert found == expected | {
        "license": f"other {flat}",
        "license_name": f"name {flat}",
        "license_link": f"https://example.org/{flat}",
    }
    assert HubCard(nasty).data.license == f"other {flat}"
    markdown = MarkdownIt("commonmark").enable("table")
    tokens, tame_tokens = (
        [each.type for token in markdown.parse(text) for each in (token, *(token.children or ()))]
        for text in (body, tame_body)
    )
    escapes = {"text", "text_special"}
    assert [kind for kind in tokens if kind not in escapes] == [
        kind for kind in tame_tokens if kind not in escapes
    ]


def test_a_licence_name_in_another_script_is_preserved():
    card = replace(CARD, license=License("other", "许可 🙂", None))
    assert HubCard(model_card(card, "dense")).data.license_name == "许可 🙂"
