"""Mixes of texts: what is one, and how its texts share the windows."""

import pytest

from layerwise.tasks.texts.text_mix import equal_or_given, interleaved, parse_mix, proportional_shares


@pytest.mark.parametrize(
    ("value", "sources"),
    [
        (
            "c4:64,file:chat.jsonl:32,wikitext2:32",
            [("c4", 64), ("chat.jsonl", 32), ("wikitext2", 32)],
        ),
        ("builtin, ptb", [("builtin", None), ("ptb", None)]),
        ("hf:owner/name/config:train:3,c4:5", [("hf:owner/name/config:train", 3), ("c4", 5)]),
        ("hf:owner/name:3,c4:5", [("hf:owner/name", 3), ("c4", 5)]),
        ("file:a,b.txt:3,file:s3://bucket/c,d/*.jsonl:5", [("a,b.txt", 3), ("s3://bucket/c,d/*.jsonl", 5)]),
        ("file:http://host:80/a.txt,c4", [("http://host:80/a.txt", None), ("c4", None)]),
        ("file:///a.txt:3,c4:5", [("file:///a.txt", 3), ("c4", 5)]),
        ("file:c4:3,c4:5", [("./c4", 3), ("c4", 5)]),  # a folder, and the data set
    ],
)
def test_a_mix_is_a_list_of_names_and_marked_paths(value, sources):
    assert [(source.name, source.windows) for source in parse_mix(value)] == sources


@pytest.mark.parametrize(
    "value",
    [
        "c4",
        "c4:64",
        "file:chat.jsonl",
        "hf:owner/name/a,b:train",
        "hf:owner/name:2024",
        "hf://datasets/owner/name/a,c4.txt",
        "data/a,b.txt",
        "data/a,c4",
        "s3://bucket/a,c4:64,ptb",
        "c4,wikitext2.txt",
        "builtin/a.txt,c4",
        "simplecache::s3://bucket/a.jsonl",
    ],
)
def test_every_value_that_does_not_start_with_a_source_or_has_only_one_is_one_text(value):
    assert parse_mix(value) == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("file:,c4", "has a text without a name"),
        ("file::32,c4:64", "has a text without a name"),
        ("c4:64,", "has a comma without a text after it"),
        ("c4:64,,ptb:32", "has a comma without a text after it"),
        ("c4, ptb , ", "has a comma without a text after it"),
    ],
)
def test_missing_names_and_superfluous_commas_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        parse_mix(value)


def test_shares_are_equal_unless_they_are_given_and_the_first_texts_get_the_remainder():
    assert equal_or_given(parse_mix("c4,ptb,builtin"), 128) == (43, 43, 42)
    assert equal_or_given(parse_mix("c4:1,ptb:5"), 6) == (1, 5)
    assert proportional_shares(10, [4, 2, 1]) == [6, 3, 1]


def test_every_beginning_of_a_mix_has_its_proportions():
    order = interleaved([64, 32, 32])
    assert sorted(order) == list(range(128))
    for end in (4, 16, 100):
        from_first = sum(position < 64 for position in order[:end])
        assert abs(from_first - end / 2) <= 1
