"""Corpora on the Hugging Face hub, read without network from a datasets cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo

from layerwise.tasks.texts.corpora import open_corpus
from layerwise.tasks.texts.hub_corpus import choose_split

REPOSITORY = Path(__file__).parents[3]
# Rows as in Salesforce/wikitext: one line each, with its leading space and line end; "" for a blank line.
WIKITEXT = {
    "train": ["", " = A train = \n", "", " It left . \n"],
    "validation": ["", " = A choice = \n", " It was made . \n"],
    "test": ["", " = Robert Boulter = \n", "", " Robert Boulter is an English actor . \n", " He acts . \n"],
}
PTB = {
    "train": ["a train", "it left"],
    "validation": ["a choice was <unk>"],
    "test": ["no it was n't black monday", "but while the new york stock exchange did n't fall", "it rose"],
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("role", "splits", "chosen"),
    [
        ("calibration", ["test", "train", "validation"], "train"),
        ("selection", ["test", "train", "validation"], "validation"),
        ("test", ["test", "train", "validation"], "test"),
        ("test", ["train", "validation"], "validation"),  # allenai/c4
        ("selection", ["test", "train"], "train"),  # the test split is only used if it is the only one
        ("calibration", ["test", "validation"], "validation"),
        ("selection", ["test"], "test"),
        ("test", ["corpus"], "corpus"),
    ],
)
def test_each_role_takes_its_own_split_or_a_documented_replacement(role, splits, chosen):
    split, note = choose_split(role, splits, None, "hf:owner/name")
    assert split == chosen
    assert bool(note) == (split != {"calibration": "train", "selection": "validation", "test": "test"}[role])


def test_a_missing_or_ambiguous_split_is_refused_with_the_existing_ones():
    with pytest.raises(ValueError, match=r"no split 'dev' for test, only \['test', 'train'\]"):
        choose_split("test", ["train", "test"], "dev", "hf:owner/name")
    with pytest.raises(ValueError, match=r"for test, only \['clean', 'other'\]. Name one of them"):
        choose_split("test", ["clean", "other"], None, "hf:owner/name")


@pytest.mark.parametrize("name", ["hf:wikitext", "hf:", "hf:a/b/c/d", "hf:a/b:c:d", "hf:a/b@main"])
def test_an_invalid_hub_name_is_refused_with_the_valid_form(name):
    with pytest.raises(ValueError, match="Write hf:owner/name"):
        open_corpus(name, "test")


QUESTIONS = """
import json, sys
from layerwise.tasks.texts.corpora import open_corpus, read_text
from layerwise.tasks.sample_tokens import TokenRequest, token_stage
answers = {}
for name in ("hf:Salesforce/wikitext", "hf:Salesforce/wikitext/wikitext-2-raw-v1:test"):
    corpus = open_corpus(name, "test")
    answers[name] = [corpus.identity, corpus.label, read_text(corpus).content]
answers["selection"] = open_corpus("hf:Salesforce/wikitext", "selection").split
answers["stand-in"] = open_corpus("hf:nyu-mll/glue", "test").facts
for name, role in (("ptb", "test"), ("wikitext2", "calibration"), ("wikitext2", "test"), ("c4", "selection")):
    corpus = open_corpus(name, role)
    request = TokenRequest(role, corpus, 2, 8, seed=0 if role == "calibration" else None)
    answers[f"{name} {role}"] = [token_stage("tokenizer", request).key, corpus.label, read_text(corpus).content]
    named = TokenRequest(role, open_corpus(corpus.label, role), 2, 8, seed=request.seed)
    answers[f"{name} {role} by its label"] = token_stage("tokenizer", named).key
answers["ptb by owner"] = open_corpus("hf:ptb-text-only/ptb_text_only", "test").facts
for name in ("hf:Salesforce/wikitext/nope", "hf:Salesforce/wikitext:nope", "hf:nobody/nothing"):
    try:
        open_corpus(name, "test")
    except (ValueError, ConnectionError) as error:
        answers[name] = f"{type(error).__name__}: {error}"
try:
    read_text(open_corpus("hf:nyu-mll/glue", "selection"))
except ValueError as error:
    answers["no text"] = str(error)
json.dump(answers, sys.stdout)
"""


def cache_data_set(cache: Path, repo: str, config: str, splits: dict[str, dict[str, list]]) -> None:
    """Write a data set as an online run of datasets caches it: Arrow files in a folder named after the commit."""
    owner, name = repo.split("/")
    folder = cache / f"{owner}___{name}" / config / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    infos = SplitDict(dataset_name=name)
    for split, columns in splits.items():
        rows = Dataset.from_dict(columns)
        rows.save_to_disk(folder / f"saved-{split}")
        (arrow,) = (folder / f"saved-{split}").glob("data-*.arrow")
        arrow.rename(folder / f"{name}-{split}.arrow")
        infos[split] = SplitInfo(
            name=split, num_bytes=rows.data.nbytes, num_examples=len(rows), dataset_name=name
        )
        features = rows.features
    info = DatasetInfo(
        features=features, splits=infos, builder_name="parquet", dataset_name=name, config_name=config
    )
    info.write_to_directory(folder)


@pytest.fixture(scope="module")
def offline_answers(tmp_path_factory):
    """Results of a process without network that reads a datasets cache written by an online run."""
    folder = tmp_path_factory.mktemp("hub")
    wikitext = {split: {"text": rows} for split, rows in WIKITEXT.items()}
    cache_data_set(folder / "cache", "Salesforce/wikitext", "wikitext-2-raw-v1", wikitext)
    sentences = {split: {"sentence": rows} for split, rows in PTB.items()}
    cache_data_set(folder / "cache", "ptb-text-only/ptb_text_only", "default", sentences)
    pages = {split: {"text": ["A page.", "Another."], "url": ["x", "y"]} for split in ("train", "validation")}
    cache_data_set(folder / "cache", "allenai/c4", "en", pages)
    pairs = {"idx": [0], "label": [1], "sentence1": ["It rains."], "sentence2": ["It is wet."]}
    cache_data_set(folder / "cache", "nyu-mll/glue", "rte", {"train": pairs, "validation": pairs})
    environment = os.environ | {
        "HF_HOME": str(folder / "home"),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    asked = subprocess.run(
        [sys.executable, "-c", QUESTIONS], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    return json.loads(asked.stdout)


def test_wikitext_is_the_rows_of_its_data_set_joined_by_blank_lines(offline_answers):
    identity, label, content = offline_answers["hf:Salesforce/wikitext"]
    assert content == (
        "\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English actor . \n\n\n He acts . \n"
    )
    assert identity == {
        "repo": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "test",
        "commit": COMMIT,  # the cache's folder
    }
    assert offline_answers[label] == [identity, label, content]


@pytest.mark.parametrize(
    ("name", "label", "content"),
    [
        ("wikitext2 test", "hf:Salesforce/wikitext/wikitext-2-raw-v1:test", "\n\n".join(WIKITEXT["test"])),
        ("wikitext2 calibration", "hf:Salesforce/wikitext/wikitext-2-raw-v1:train", None),
        ("c4 selection", "hf:allenai/c4/en:validation", "A page.\n\nAnother."),
        ("ptb test", "hf:ptb-text-only/ptb_text_only/default:test", " ".join(PTB["test"])),
    ],
)
def test_a_paper_name_has_the_key_of_the_hub_data_set_that_it_means(offline_answers, name, label, content):
    key, opened, text = offline_answers[name]
    assert opened == label
    assert offline_answers[f"{name} by its label"] == key
    assert content is None or text == content


def test_the_sentences_of_ptb_are_joined_by_a_space_which_is_part_of_the_identity(offline_answers):
    facts = offline_answers["ptb by owner"]
    assert (facts["field"], facts["joint"], facts["commit"]) == ("sentence", " ", COMMIT)


def test_a_hub_split_follows_the_role_and_a_replacement_is_noted(offline_answers):
    assert offline_answers["selection"] == "validation"
    assert offline_answers["stand-in"]["split"] == "validation"
    assert offline_answers["stand-in"]["split_note"] == "for test: 'validation', because there is no 'test'"


def test_a_missing_configuration_or_split_is_named_with_the_existing_ones(offline_answers):
    assert "wikitext-2-raw-v1" in offline_answers["hf:Salesforce/wikitext/nope"]
    assert "['test', 'train', 'validation']" in offline_answers["hf:Salesforce/wikitext:nope"]
    assert offline_answers["hf:nobody/nothing"].startswith(
        "ConnectionError: hf:nobody/nothing cannot be read"
    )
    assert "there is no field 'text', only ['idx', 'label', 'sentence1'" in offline_answers["no text"]
