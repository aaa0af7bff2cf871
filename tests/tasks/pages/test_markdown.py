"""Text from outside in Markdown, as parsers of CommonMark and of GitHub's tables read it."""

import pytest
from markdown_it import MarkdownIt

from layerwise.flows.pipeline.comparison_tables import markdown_of
from layerwise.flows.pipeline.prefect_artifacts import how_to_load, where_the_report_is
from layerwise.tasks.pages.markdown import code, displayable, fenced, plain

NASTY = [
    'x"><script>alert(1)</script>',
    "a|b",
    "---\nlicense: mit\n---",
    "`x` and ``y``",
    "```\n# out",
    "# heading",
    "- list",
    "1. list",
    "12) list",
    "+ list",
    "> quote",
    "===",
    "<!-- comment",
    "&lt;b&gt; &amp;",
    "*a* _b_ __c__ ~~d~~ my_model_x",
    "[link](javascript:alert(1))",
    "![image](https://x/y.png)",
    "<https://x>",
    "\\",
    "trailing \\",
    "$x$ \\(y\\)",
    "{{ 7 * 7 }}",
    "Größe 模型 🙂",
    "`",
    "-0.5",
    "0.95",
]
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def leaves(text):
    """Return kind and content of all elements of a Markdown text, except its paragraphs and headings."""
    inline = [each for token in MARKDOWN.parse(text) for each in (token.children or [token])]
    kept = [each for each in inline if each.content or each.type == "hr"]
    return [(each.type, each.content) for each in kept]


def shown(text):
    """Return the text, and check that there is nothing else."""
    found = leaves(text)
    assert {kind for kind, _ in found} <= {"text", "text_special"}
    return "".join(content for _, content in found)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_plain_text_is_shown_unchanged_at_any_position(text):
    expected = " ".join(text.split())
    assert shown(plain(text)) == expected
    assert shown(f"# {plain(text)}, 50 % sparse") == f"{expected}, 50 % sparse"
    assert shown(f"{plain(text)}. The end") == f"{expected}. The end"
    cells = MARKDOWN.parse(f"| {plain(text)} | two |\n|:--|:--|\n| {plain(text)} | two |\n")
    assert [cell.content for token in cells for cell in token.children or [] if token.content == "two"] == [
        "two",
        "two",
    ]
    assert sum(token.type == "tr_open" for token in cells) == 2


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_code_shows_the_text(text):
    assert leaves(f"Made from {code(text)} by us") == [
        ("text", "Made from "),
        ("code_inline", " ".join(text.split())),
        ("text", " by us"),
    ]
    assert leaves(f"{fenced(text)}\n\nend") == [("fence", f"{text}\n"), ("text", "end")]


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_pages_of_prefect_show_locations_as_code(text):
    kinds = [kind for kind, _ in leaves(how_to_load(text))]
    assert kinds == ["fence", "fence"]
    assert leaves(how_to_load(text))[0][1] == f"{text}\n"
    assert repr(text) in leaves(how_to_load(text))[1][1]
    assert ("fence", f"{text}\n") in leaves(where_the_report_is(text))


def test_a_table_has_one_cell_for_each_value():
    rows = [{"name": name, "value": number - 0.5} for number, name in enumerate(NASTY)]
    tokens = MARKDOWN.parse(markdown_of(rows))
    assert sum(token.type == "td_open" for token in tokens) == 2 * len(NASTY)
    assert not [token for token in tokens if token.type.startswith("html")]
    assert "| 0.95 | 24.5 |" in markdown_of(rows)


def test_characters_that_cannot_be_printed_are_replaced():
    assert displayable("a\tb\r\nc\x1b[2J\u202e\x00\udcff") == "a b c�[2J���"
    fenced("\udcff").encode()


def test_ordinary_names_stay_unchanged():
    for name in (
        "owner/name@0123abc",
        "SmolLM2-135M_v1.0",
        "demo at 0.6",
        "s3://bucket/my store (2)",
        "-0.5",
    ):
        assert plain(name) == name
