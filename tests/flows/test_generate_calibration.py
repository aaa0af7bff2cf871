"""Text that the dense model writes itself, and a calibration on it."""

import datetime
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerwise.flows.generate_calibration import GenerateCalibration, generate_calibration
from layerwise.flows.runtime import Runtime
from layerwise.scoring.continuations import advance
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.generation.generate_calibration import TEXT_FILE, write_responses
from layerwise.tasks.texts.corpora import open_corpus
from layerwise.tasks.texts.token_stream import tokenise_corpus

TEMPLATE = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
PROMPTS = [
    {"prompt": "w1 w2 w3", "completion": "never read"},
    {"messages": [{"role": "user", "content": "w4"}]},
    {"prompt": "w5 w6 w7 w8 w9", "response": "never read"},
]


@pytest.fixture(scope="module")
def place(workshop, tmp_path_factory) -> Path:
    """A folder with a model that has a chat template, and prompts."""
    folder = tmp_path_factory.mktemp("generated")
    shutil.copytree(workshop.model, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"w{n} w{n + 1}"}) for n in range(3)))
    return folder


@pytest.fixture
def generated(place, prefect_backend):
    """Return a function that runs the flow, and returns the rows and the location of the text."""

    def run(store, prompts="chat.jsonl", **changes):
        settings = {
            "model": str(place / "model"),
            "prompts": str(place / prompts),
            "max_tokens": 8,
            "batch": 2,
        }
        runtime = Runtime(store=str(store), device="cpu", boundary_layers=1)
        artifact = generate_calibration(GenerateCalibration(**settings | changes), runtime)
        location = ArtifactStore(str(store)).location(artifact, TEXT_FILE)
        return list(map(json.loads, Path(location).read_text().splitlines())), location

    return run


def test_the_responses_are_those_of_transformers_and_a_text_to_calibrate_on(generated, place, tmp_path):
    rows, location = generated(tmp_path / "store", temperature=0)
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    questions = [row.get("prompt") or row["messages"][0]["content"] for row in PROMPTS]
    for row, question in zip(rows, questions, strict=True):
        ids = tokenizer(f"{question} ", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            written = model.generate(
                ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        expected = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["messages"] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": expected},
        ]
    stream = tokenise_corpus(open_corpus(location, "calibration"), tokenizer)
    assert (stream.conversations, int(stream.responses.sum())) == (3, 3 * 8)


def test_a_streamed_model_writes_what_the_model_in_memory_writes(generated, tmp_path):
    """With the most likely token, in float32. The batches hold prompts of different lengths."""
    for prompts in ("chat.jsonl", "texts.jsonl"):
        same = {"prompts": prompts, "temperature": 0, "dtype": "float32"}
        in_memory, _ = generated(tmp_path / "store", **same)
        streamed, _ = generated(tmp_path / "store", **same, way="streamed")
        assert streamed == in_memory


def test_a_streamed_model_that_dies_in_a_pass_writes_the_same_after_it(generated, tmp_path, monkeypatch):
    settings = {"way": "streamed", "temperature": 1.5, "seed": 3}
    layers, dies_at = [], None

    def counted(model, index, *arguments):
        layers.append(index)
        if len(layers) == dies_at:
            raise OSError("the machine died")
        return advance(model, index, *arguments)

    monkeypatch.setattr("layerwise.tasks.generation.streamed_responses.advance", counted)
    rows, location = generated(tmp_path / "one", **settings)
    assert len({row["messages"][-1]["content"] for row in rows}) == 3
    undisturbed = len(layers)
    assert undisturbed == 8 * (max(layers) + 1)
    layers, dies_at = [], undisturbed // 2 + 2
    with pytest.raises(OSError, match="the machine died"):
        generated(tmp_path / "two", **settings)
    _, resumed = generated(tmp_path / "two", **settings)
    assert Path(resumed).read_bytes() == Path(location).read_bytes()
    assert len(layers) == undisturbed + 2  # the layer before the death, and the one in which it died


def test_a_model_that_does_not_fit_is_refused_with_the_cost_of_streaming(generated, tmp_path, monkeypatch):
    monkeypatch.setattr("layerwise.tasks.generation.generate_calibration.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="needs .* of memory in float32, but 1 kB are free .*--way streamed, which "
                       "holds one layer: up to 8 passes over the .* of the layers, .* of reads"):  # fmt: skip
        generated(tmp_path / "store")
    assert len(generated(tmp_path / "store", way="streamed")[0]) == 3


def test_texts_are_continued_and_the_draws_follow_the_seed_also_after_an_interruption(
    generated, tmp_path, monkeypatch
):
    texts = {"prompts": "texts.jsonl", "temperature": 1.5}
    rows, location = generated(tmp_path / "one", **texts)
    assert [row["text"][:3] for row in rows] == ["w0 ", "w1 ", "w2 "]
    other, _ = generated(tmp_path / "one", **texts, seed=1)
    assert other != rows

    calls = []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("the machine died")
        return write_responses(*arguments)

    monkeypatch.setattr("layerwise.tasks.generation.generate_calibration.write_responses", dying)
    with pytest.raises(OSError, match="the machine died"):
        generated(tmp_path / "two", **texts)
    again, resumed = generated(tmp_path / "two", **texts)
    assert len(calls) == 3
    assert Path(resumed).read_bytes() == Path(location).read_bytes()


def test_a_run_that_dies_after_the_last_partial_batch_does_not_write_its_rows_again(
    generated, tmp_path, monkeypatch
):
    texts = {"prompts": "texts.jsonl", "temperature": 1.5}

    require_files = Draft.require_files  # called just before the commit

    def dying(draft):
        if "responses" in draft.facts:
            raise OSError("the machine died")
        require_files(draft)

    with monkeypatch.context() as patch:
        patch.setattr(Draft, "require_files", dying)
        with pytest.raises(OSError, match="the machine died"):
            generated(tmp_path / "one", **texts)
    with monkeypatch.context() as patch:
        patch.setattr("layerwise.tasks.generation.generate_calibration.write_responses", None)  # not called
        resumed, _ = generated(tmp_path / "one", **texts)
    assert resumed == generated(tmp_path / "two", **texts)[0]


def test_empty_and_long_prompts_are_skipped_with_one_warning(generated, place, tmp_path, caplog):
    (place / "mixed.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in ("w1 " * 70, "", "w2", "w3"))
    )
    rows, _ = generated(tmp_path / "store", prompts="mixed.jsonl", documents=1)
    assert [row["text"][:2] for row in rows] == ["w2"]
    (warning,) = [each.message for each in caplog.records if "skipped" in each.message]
    assert "skipped 1 empty rows and 1 rows of more than 56 tokens" in warning


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 64}, "max_tokens is 64, but the context of .* has 64 tokens"),
        ({"prompts": "long.jsonl"}, "no prompts that the model can answer; it has 0 empty rows and 1 rows of more than 56"),
        ({"prompts": "nothing.jsonl"}, "contains no prompts"),
        ({"prompts": "half.jsonl"}, "document 1 has half a surrogate pair, '.ud800', at character 3"),
        ({"prompts": "dated.parquet"}, "row 1: a message has a value that JSON does not have .*datetime"),
        ({"model": "narrow", "prompts": "rare.jsonl"}, "narrow makes token ids up to 61 of the text .*rare.jsonl, but"),
        ({"prompts": "answers.jsonl"}, "row 1 has only messages of the assistant, and no prompt"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_answered_are_refused_before_the_import(
    generated, place, workshop, tmp_path, changes, message
):
    (place / "nothing.jsonl").write_text("")
    (place / "answers.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "w1"}]}))
    (place / "half.jsonl").write_text(json.dumps({"text": "w1 \ud800"}))
    dated = {"role": "user", "content": "w1", "at": datetime.datetime(2024, 7, 26)}
    pq.write_table(pa.Table.from_pylist([{"messages": [dated]}]), place / "dated.parquet")
    (place / "long.jsonl").write_text(json.dumps({"text": "w1 " * 70}))
    (place / "rare.jsonl").write_text(json.dumps({"text": "w60"}))
    if "model" in changes:
        changes = {**changes, "model": str(workshop.folder / changes["model"])}
    with pytest.raises(ValueError, match=message):
        generated(tmp_path / "store", **changes)
    assert list(ArtifactStore(str(tmp_path / "store")).artifacts()) == []
