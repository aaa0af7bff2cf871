"""Corpora by name: the built-in one, and files on any storage; the part of a corpus that each role gets."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import sys

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from layerwise.tasks.texts.corpora import assign_parts, open_corpus, read_text, require_apart
from layerwise.tasks.texts.hub_corpus import HubCorpus

CHAT = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]}
DOCUMENTS = ["One.", "", "Zwei: ä\r\nund drei."]
JOINED = "One.\n\n\n\nZwei: ä\r\nund drei."


def as_parquet(rows):
    sink = pa.BufferOutputStream()
    write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def as_json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def place(store):
    """Write a file next to the store and return its URL. Corpora work on every storage that works for stores."""

    def put(name, data):
        path = f"{store.root}/corpora/{name}"
        store.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        store.fs.pipe_file(path, data)
        return store.fs.unstrip_protocol(path)

    return put


def test_a_plain_text_is_one_document_with_unchanged_line_ends(place):
    assert read_text(open_corpus(place("a.txt", JOINED.encode()), "test")).content == JOINED


def test_json_lines_and_parquet_are_joined_by_a_blank_line_with_empty_documents_kept(place):
    rows = [{"text": document, "url": "x"} for document in DOCUMENTS]
    files = {
        "a.jsonl": as_json_lines(rows),
        "a.jsonl.gz": gzip.compress(as_json_lines(rows)),
        "c4-train.00000-of-01024.json.gz": gzip.compress(as_json_lines(rows)),
        "lines.json": as_json_lines(rows),
        "array.json": json.dumps(rows, indent=1).encode(),
        "a.parquet": as_parquet(rows),
    }
    for name, data in files.items():
        text = read_text(open_corpus(place(name, data), "test"))
        assert text.content == JOINED
        assert text.sha256 == hashlib.sha256(JOINED.encode()).hexdigest()
        assert not text.truncated


def test_a_replaced_file_is_another_corpus_even_if_it_has_the_same_size(place):
    before = open_corpus(place("a.txt", b"one"), "test")
    after = open_corpus(place("a.txt", b"two"), "test")
    assert before.identity != after.identity
    assert assign_parts({"selection": before, "test": after}) == {"selection": (0, 1), "test": (0, 1)}


def test_a_file_that_is_replaced_during_a_run_is_refused(place):
    corpus = open_corpus(place("a.txt", b"one"), "test")
    place("a.txt", b"two")
    with pytest.raises(OSError, match="a.txt changed while it was in use"):
        read_text(corpus)


def test_a_missing_file_is_named(place):
    url = place("a.txt", b"one").replace("a.txt", "b.txt")
    with pytest.raises(FileNotFoundError, match="no corpus at .*b.txt"):
        open_corpus(url, "test")


def test_a_copy_in_another_folder_has_the_same_identity_if_name_and_contents_are_equal(tmp_path):
    identities = []
    for folder, text, time in (("one", "text", 1e9), ("two", "text", 2e9), ("three", "TEXT", 1e9)):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "a.txt"
        file.write_text(text)
        os.utime(file, (time, time))
        identities.append(open_corpus(str(file), "test").identity)
    assert identities[0] == identities[1]
    assert identities[0] != identities[2]  # the same name, size and time: archives give many files one time
    assert str(tmp_path) not in json.dumps(identities)


def test_large_texts_with_equal_names_sizes_and_times_are_distinguished_beyond_their_first_megabytes(
    tmp_path,
):
    fingerprints = []
    for folder, last in (("one", "a"), ("two", "b")):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "a.txt"
        file.write_text("The same words. " * 400_000 + f"Other {last} words. " * 10_000)
        os.utime(file, (1e9, 1e9))
        fingerprints.append(open_corpus(str(file), "test").fingerprint)
    assert fingerprints[0].split()[0] != fingerprints[1].split()[0]  # apart from the times


def test_reading_stops_at_the_limit_and_says_so(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(as_json_lines([{"text": "abc"}, {"text": "def"}]) + b"this line is never read")
    corpus = open_corpus(str(file), "test")
    assert (read_text(corpus, limit=7).content, read_text(corpus, limit=7).truncated) == ("abc\n\nde", True)
    with pytest.raises(ValueError, match="row 3 is not valid JSON"):
        read_text(corpus, limit=8)


def test_a_text_as_long_as_the_limit_is_not_truncated(tmp_path):
    (tmp_path / "a.txt").write_text("abcdef")
    corpus = open_corpus(str(tmp_path / "a.txt"), "test")
    assert not read_text(corpus, limit=6).truncated
    assert read_text(corpus, limit=5).truncated


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"body": "x", "url": "y"}', r"row 1: there is no field 'text', only \['body', 'url'\]"),
        ("a.parquet", as_parquet([{"body": "x"}]), r"schema: there is no field 'text', only \['body'\]"),
        ("a.jsonl", as_json_lines([{"text": "x"}, {"text": None}]), "row 2: field 'text' holds NoneType"),
        ("a.parquet", as_parquet([{"text": 1}]), "row 1: field 'text' holds int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"', "row 2 is not valid JSON"),
        ("a.jsonl", b'["x"]', "row 1 holds list, not an object"),
        ("a.json", b'["x"]', "row 1 holds str, not an object"),
        ("a.json", b'[{"text": "x"}', "is not valid JSON"),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "row 1 is not valid JSON"),
        (
            "a.json",
            b'{\n"text": "x"}',
            "row 1 is not valid JSON.*one object on each line, or one array of objects",
        ),
        ("chat.jsonl", b'{"messages": []}', "row 1: field 'messages' holds no messages"),
        ("chat.parquet", as_parquet([{"conversations": "x"}]), "field 'conversations' holds str, not a list"),
        (
            "chat.jsonl",
            as_json_lines([{"conversations": [{"from": "human", "value": "x"}]}]),
            r"row 1: field 'conversations' has a message without a role.*\['from', 'value'\].*\"role\": \"user\"",
        ),
        ("chat.jsonl", as_json_lines([{"prompt": "x"}]), r"no field 'text', only \['prompt'\].*'completion'"),
        ("mixed.jsonl", as_json_lines([{"text": "x"}, CHAT]), "row 2 is a conversation, and .* are texts"),
        ("mixed.jsonl", as_json_lines([CHAT, {"text": "x"}]), "document 2 is a text, .* are conversations"),
        ("a.parquet", b"PAR1 but no more", "cannot be read as Parquet"),
        ("a.txt", "ä".encode("latin-1"), "is not valid UTF-8: byte 0xe4"),
        ("a.txt", b" \n", "contains no text"),
        ("a.jsonl", rb'{"text": "a\ud800"}', "half a surrogate pair, '.ud800', at character 1"),
    ],
)
def test_data_that_are_not_text_are_refused_with_their_position(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_text(open_corpus(str(tmp_path / name), "test"))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
def test_compressed_text_that_is_damaged_is_refused_on_any_storage(place, suffix, compress):
    """On a bucket, too, it is the file that is wrong, and not the connection."""
    whole = compress(as_json_lines([{"text": "x"}]))
    for name, data in (("cut", whole[:-9]), ("never", b"not compressed")):
        with pytest.raises(OSError, match=f"{name}.jsonl.{suffix} is cut off, damaged, or not compressed"):
            read_text(open_corpus(place(f"{name}.jsonl.{suffix}", data), "test"))


@pytest.mark.parametrize("name", ["wikitext-2", "PTB", "corpus.csv", "a.parquet.gz"])
def test_an_unknown_corpus_name_is_refused_with_the_valid_forms(name):
    with pytest.raises(ValueError, match="is not a corpus. Use 'builtin', 'hf:owner/name.*'ptb', .*jsonl"):
        open_corpus(name, "test")


@pytest.fixture
def place_shards(place):
    """Write files into a folder next to the store, and return the URL of the folder."""

    def put(files):
        urls = [place(f"shards/{name}", data) for name, data in files.items()]
        return urls[0].rpartition("/")[0]

    return put


def test_a_folder_and_a_pattern_are_one_text_in_the_order_of_the_file_names(place_shards):
    url = place_shards(
        {
            "part-1.jsonl": as_json_lines([{"text": "three"}]),
            "part-0.jsonl.gz": gzip.compress(as_json_lines([{"text": "one"}, {"text": "two"}])),
            "README.md": b"about",
            "readme.txt": b"about",
            "_SUCCESS": b"",
            "._part-2.jsonl": b"not JSON",
        }
    )
    corpora = [open_corpus(name, "test") for name in (url, f"{url}/", f"{url}/part-*")]
    assert {read_text(corpus).content for corpus in corpora} == {"one\n\ntwo\n\nthree"}
    assert corpora[0] == corpora[1] == corpora[2]


def test_the_identity_of_shards_depends_on_their_contents_and_number(place_shards):
    url = place_shards({"a.txt": b"one", "b.txt": b"two"})
    before = open_corpus(url, "test")
    place_shards({"b.txt": b"TWO"})
    with pytest.raises(OSError, match="shards changed while it was in use"):
        read_text(before)
    replaced = open_corpus(url, "test")
    place_shards({"c.txt": b"three"})
    identities = [before.identity, replaced.identity, open_corpus(url, "test").identity]
    assert len({json.dumps(identity) for identity in identities}) == 3
    assert "corpora" not in json.dumps(identities)  # the location is not part of the identity


def test_the_identity_of_a_local_text_depends_on_every_byte_and_not_on_times(tmp_path):
    content = bytearray(b"a text of some words " * 400_000)
    first, same, other = (tmp_path / folder / "a.txt" for folder in ("first", "same", "other"))
    for file, changed in ((first, 0), (same, 0), (other, 1)):
        file.parent.mkdir()
        content[4_100_077] += changed
        file.write_bytes(content)
    os.utime(same, (1, 1))
    identities = [open_corpus(str(file), "test").identity for file in (first, same, other)]
    assert identities[0] == identities[1]
    assert identities[0]["fingerprint"].split()[0] != identities[2]["fingerprint"].split()[0]


def test_reading_shards_stops_at_the_limit_and_later_ones_are_never_opened(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_json_lines([{"text": "abc"}, {"text": "def"}]))
    (tmp_path / "b.jsonl").write_text("never read")
    corpus = open_corpus(str(tmp_path), "test")
    assert (read_text(corpus, limit=7).content, read_text(corpus, limit=7).truncated) == ("abc\n\nde", True)
    with pytest.raises(ValueError, match="b.jsonl, row 1 is not valid JSON"):
        read_text(corpus)


def test_shards_beyond_those_that_a_text_can_need_are_ignored(tmp_path, monkeypatch, caplog):
    """Each fingerprint takes a request, so a corpus of a thousand shards must not cost more than the first ones."""
    monkeypatch.setattr("layerwise.tasks.texts.sharded_corpus.SHARD_BYTES", 10)
    for name, text in {"a.txt": "four", "b.txt": "sixsix", "c.txt": "more"}.items():
        (tmp_path / name).write_text(text)
    corpus = open_corpus(str(tmp_path), "test")
    assert read_text(corpus).content == "four\n\nsixsix"
    assert (corpus.facts["shards"], corpus.facts["shards_found"]) == (2, 3)
    assert "the first 2 of 3 files" in caplog.text
    (tmp_path / "c.txt").write_text("other")
    assert open_corpus(str(tmp_path), "test").identity == corpus.identity


@pytest.mark.parametrize(
    ("files", "pattern", "message"),
    [
        (["a.txt", "b.jsonl"], "", r"files of 2 formats: a.txt, b.jsonl. Give a pattern"),
        (["notes.md", "deeper/a.txt"], "", r"contains no text file \(deeper/, notes.md\)"),
        ([], "", r"contains no text file \(it is empty\)"),
        (["data-0.arrow", "dataset_info.json"], "", "written by datasets.save_to_disk.*to_parquet"),
        (["a.jsonl", "b.csv"], "*", "matches b.csv, which are not text files"),
        (["a.txt"], "*.jsonl", r"no file matches .*\*.jsonl"),
    ],
)
def test_files_that_are_not_a_corpus_are_named(tmp_path, files, pattern, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_corpus(str(tmp_path / pattern), "test")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[0].txt").write_text("brackets")
    (tmp_path / "a0.txt").write_text("zero")
    assert read_text(open_corpus(str(tmp_path / "a[0].txt"), "test")).content == "brackets"


def test_a_file_in_a_folder_with_brackets_in_its_name_is_found(tmp_path):
    (tmp_path / "texts [old]").mkdir()
    (tmp_path / "texts [old]" / "a.txt").write_text("old")
    assert read_text(open_corpus(str(tmp_path / "texts [old]"), "test")).content == "old"
    assert read_text(open_corpus(str(tmp_path / "texts [old]" / "a.txt"), "test")).content == "old"


def test_shards_on_a_web_server_are_refused_because_http_has_no_folders():
    with pytest.raises(ValueError, match="is not a corpus"):
        open_corpus("https://host.invalid/folder", "test")


def test_the_missing_package_for_zstandard_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    for module in ("compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("a.jsonl.zst", ""):
        with pytest.raises(
            ImportError, match="a.jsonl.zst is compressed with Zstandard.*pip install backports.zstd"
        ):
            open_corpus(str(tmp_path / name), "test")


def test_all_frames_of_a_zstandard_file_are_read_and_a_truncated_file_is_refused(tmp_path):
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    lines = [as_json_lines([{"text": text}]) for text in ("one", "two")]
    frames = b"".join(map(zstd.compress, lines))
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert read_text(open_corpus(str(tmp_path / "a.jsonl.zst"), "test")).content == "one\n\ntwo"
    (tmp_path / "cut.jsonl.zst").write_bytes(frames[:-5])
    with pytest.raises(OSError, match="cut.jsonl.zst is cut off"):
        read_text(open_corpus(str(tmp_path / "cut.jsonl.zst"), "test"))


def test_the_signature_of_a_url_appears_neither_in_errors_nor_in_the_corpus():
    with pytest.raises(ValueError, match="is not a corpus") as error:
        open_corpus("https://host/folder?X-Amz-Signature=secret", "test")
    assert "secret" not in str(error.value)
    corpus = open_corpus_of_memory("signed.txt")
    assert "memory:" not in repr(corpus)


def open_corpus_of_memory(name):
    import fsspec

    fsspec.filesystem("memory").pipe_file(f"/{name}", b"text")
    return open_corpus(f"memory://{name}", "test")


def test_the_builtin_corpus_is_identified_by_its_text_and_needs_neither_network_nor_files():
    corpus = open_corpus("builtin", "calibration")
    text = read_text(corpus)
    assert corpus.identity == {"builtin": text.sha256}
    assert len(text.content) > 300_000
    assert 'The "assert" statement' in text.content


def hub(split, commit="c"):
    return HubCorpus("owner/name", "config", split, commit)


def test_roles_with_different_corpora_get_all_of_them():
    corpora = {"calibration": hub("train"), "selection": hub("validation"), "test": hub("test")}
    assert set(assign_parts(corpora).values()) == {(0.0, 1.0)}


def test_roles_that_share_a_corpus_get_consecutive_parts_by_their_shares():
    shared = open_corpus("builtin", "test")
    assert assign_parts({"test": shared, "selection": shared, "calibration": shared}) == {
        "calibration": (0.0, 0.5),
        "selection": (0.5, 0.75),
        "test": (0.75, 1.0),
    }


def test_different_corpora_of_two_roles_with_a_common_file_are_refused(place_shards):
    url = place_shards({"a.txt": b"one", "b.txt": b"two"})
    both, again, pattern, file = (
        open_corpus(name, "test") for name in (url, f"{url}/*.txt", f"{url}/[b].txt", f"{url}/b.txt")
    )
    for selection, test in ((both, file), (file, both), (pattern, file), (both, pattern)):
        with pytest.raises(ValueError, match=r"selection .* and test .* both contain b\.txt"):
            require_apart({"calibration": hub("train"), "selection": selection, "test": test})
    require_apart({"calibration": both, "selection": again, "test": open_corpus("builtin", "test")})
    require_apart({"calibration": file, "selection": open_corpus(f"{url}/a.txt", "test")})


def test_shares_are_renormalised_over_the_roles_that_share():
    parts = assign_parts({"calibration": hub("train"), "selection": hub("train"), "test": hub("test")})
    assert parts == {"calibration": (0.0, 2 / 3), "selection": (2 / 3, 1.0), "test": (0.0, 1.0)}


def test_a_replacement_split_is_shared_with_the_role_it_belongs_to():
    own, stand_in = (
        hub("validation"),
        HubCorpus("owner/name", "config", "validation", "c", note="no test split"),
    )
    assert assign_parts({"selection": own, "test": stand_in}) == {"selection": (0, 0.5), "test": (0.5, 1)}
