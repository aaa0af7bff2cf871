"""The search flow as a whole, on a real Prefect server."""

import hashlib
import json
import math
import re
import shlex
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import ParameterTypeError, PrefectHTTPStatusError
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layerwise.flows.cli.parser import parse_command
from layerwise.flows.options import read_options
from layerwise.flows.pipeline.lookup import look_up
from layerwise.flows.plan import plan_search
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.results.search_result import RESULT_FILE
from layerwise.tasks.results.summary import table_rows
from layerwise.tasks.texts.token_windows import read_input_ids

ROLES = ["checkpoint", "calibration", "selection", "test", "capture", "allocate"]
LANES = ["lane beta 0", "lane beta 0.1", "lane beta 0.25"]
END = ["select", "export", "evaluate"]
BUILTIN = "\n\n".join(topics[name] for name in sorted(topics))
PHRASE = r"[^\n.,:()]+"


def keys_of(result):
    return {role: artifact.key for role, artifact in result.stages.items()}


def content_of(result):
    return {role: artifact.content for role, artifact in result.stages.items() if role != "checkpoint"}


def test_the_first_search_builds_everything(finished):
    result, _ = finished
    assert list(result.stages) == ROLES + LANES + END
    assert list(result.built) == ROLES + LANES + END
    assert [row.beta for row in result.selection.rows] == [0.0, 0.1, 0.25]
    assert {row.realised_sparsity for row in result.selection.rows} == {0.5}


def test_weights_are_read_once_for_each_pass(finished, workshop):
    """The passes are those of the import, the dense model, the lanes, and the export together with the test."""
    result, runtime = finished
    index = import_checkpoint(ArtifactStore(runtime.store), str(workshop.model)).index
    assert result.bytes_read == 4 * sum(index.layer_bytes) + 5 * index.outer_bytes


def test_the_second_search_builds_nothing_and_reads_no_weights(finished, run_search):
    result, runtime = finished
    store = ArtifactStore(runtime.store)
    before = store.fs.find(store.root)
    again = run_search()
    assert again.built == ()
    assert again.bytes_read == 0
    assert (again.selection, again.test, again.pruned) == (result.selection, result.test, result.pruned)
    assert keys_of(again) == keys_of(result)
    (log,) = set(store.fs.find(store.root)) - set(before)
    about, *lines = map(json.loads, Path(log).read_text().splitlines())
    assert (about["state"], about["result"]) == ("finished", again.artifact.key)
    assert [line["message"] for line in lines if line["message"].startswith("capture: done in 0")]
    parsed = parse_command(shlex.split(about["command"])[1:])
    assert (read_options(parsed, Search), read_options(parsed, SearchRuntime)) == (again.settings, runtime)


@pytest.mark.parametrize("fresh_store_url", ["memory", "s3"], indirect=True)
def test_a_search_builds_the_same_artifacts_in_every_kind_of_store(finished, run_search, fresh_store_url):
    result, _ = finished
    there = run_search(fresh_store_url)
    assert keys_of(there) == keys_of(result)
    assert content_of(there) == content_of(result)
    fs, folder = open_filesystem(there.pruned)
    assert {"config.json", "tokenizer.json", "README.md"} <= {path.split("/")[-1] for path in fs.find(folder)}
    assert run_search(fresh_store_url).built == ()


def test_the_exported_model_has_the_reported_losses(finished, tmp_path):
    result, runtime = finished
    store = ArtifactStore(runtime.store)
    model = AutoModelForCausalLM.from_pretrained(result.pruned)
    for role, perplexity in (
        ("selection", result.selection.best_row.perplexity),
        ("test", result.test.best),
    ):
        input_ids = read_input_ids(store, result.stages[role])
        with torch.no_grad():
            losses = [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in input_ids]
        assert math.exp(sum(losses) / len(losses)) == pytest.approx(perplexity, rel=1e-5)


def test_only_the_evaluation_and_the_result_have_the_test_windows_as_input(finished):
    result, runtime = finished
    store = ArtifactStore(runtime.store)
    windows = {
        role: read_input_ids(store, result.stages[role]) for role in ("calibration", "selection", "test")
    }
    assert [tuple(ids.shape) for ids in windows.values()] == [(6, 16), (4, 16), (3, 16)]
    test = result.stages["test"]
    readers = [
        artifact.recipe["name"]
        for artifact in store.artifacts()
        if {test.key, test.content} & set(artifact.recipe["inputs"].values())
    ]
    assert sorted(set(readers)) == ["evaluate", "search"]


@pytest.mark.parametrize(
    ("changes", "built"),
    [
        ({"test_windows": 2}, ["test", "evaluate"]),
        ({"betas": [0.1, 0.2, 0.25]}, ["allocate", "lane beta 0.2", "select"]),
        ({"retain": "sampled"}, ["capture"]),
        ({"seed": 1}, ["calibration", "capture", *LANES, *END]),
        ({"pruner": {"method": "magnitude"}}, [*LANES, *END]),
        ({"calibration_mode": "sequential"}, [*LANES, *END]),
        ({"sparsity": 0.4}, ["allocate", *LANES, *END]),
        ({"dtype": "bfloat16"}, ["capture", *LANES, *END]),
    ],
)
def test_a_changed_setting_rebuilds_only_the_stages_that_depend_on_it(
    finished, run_search, untouched_store, changes, built
):
    result = run_search(str(untouched_store), **changes)
    expected = [role for role in result.stages if role in built]
    assert expected
    # If the new beta is the best one, it is exported as well.
    extra = END if result.selection.best_row.beta != finished[0].selection.best_row.beta else []
    assert [role for role in result.built if role not in extra] == [
        role for role in expected if role not in extra
    ]
    assert run_search(str(untouched_store), **changes).built == ()


def test_an_interrupted_search_continues_from_its_last_resume_point(
    finished, workshop, tmp_path, monkeypatch, prefect_backend
):
    runtime = SearchRuntime(store=str(tmp_path / "store"), boundary_layers=1)
    computed = []
    read_statistics = __import__(
        "layerwise.tasks.lanes.lane_group", fromlist=["read_statistics"]
    ).read_statistics

    def dying(store, artifact, layer, *rest):
        computed.append(layer)
        if layer == 1 and len(computed) == 2:
            raise OSError("the machine died")
        return read_statistics(store, artifact, layer, *rest)

    monkeypatch.setattr("layerwise.tasks.lanes.lane_group.read_statistics", dying)
    with pytest.raises(OSError, match="the machine died"):
        search(workshop.settings(), runtime)
    result = search(workshop.settings(), runtime)
    assert computed[:5] == [0, 1, 1, 2, 0]  # the last 0 is from the evaluation
    assert list(result.built) == [*LANES, *END]
    assert content_of(result) == content_of(finished[0])


def test_prefect_has_the_result_table_and_a_link_to_the_model(finished, workshop):
    state = search(workshop.settings(), finished[1], return_state=True)
    result, run = state.result(), state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        ours = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id={"any_": [run]}))
    artifacts = {artifact.key: artifact for artifact in ours}
    assert artifacts["search-result"].type == "table"
    assert json.loads(artifacts["search-result"].data) == table_rows(result.selection)
    assert result.selection.verdict in artifacts["search-result"].description
    assert result.pruned in artifacts["pruned-model"].data


def test_the_result_table_can_be_checked_by_hand(finished):
    selection = finished[0].selection
    rows = table_rows(selection)
    assert [row["beta"] for row in rows] == [0.0, 0.1, 0.25]
    assert [row["plan"] for row in rows] == ["uniform", "ATP", "ATP"]
    assert [row["above best"] == "best" for row in rows] == [i == selection.best for i in range(3)]
    for row, score in zip(rows, selection.rows, strict=True):
        assert row["perplexity"] == pytest.approx(math.exp(score.loss), abs=0.006)
        assert row["realised sparsity"] == 0.5
        if score.above_best is not None:
            assert float(row["above best"]) == pytest.approx(score.loss - selection.best_row.loss, abs=1e-4)


def test_the_result_is_in_the_store_as_well(finished, workshop):
    result, runtime = finished
    store = ArtifactStore(runtime.store)
    documents = [
        json.loads(store.read(artifact, RESULT_FILE))
        for artifact in store.artifacts()
        if artifact.recipe["name"] == "search"
    ]
    (document,) = [d for d in documents if d["stages"] == keys_of(result)]
    assert document["settings"] == workshop.settings().model_dump(mode="json")
    assert document["verdict"] == result.selection.verdict
    (committed,) = [
        a for a in store.artifacts() if set(a.recipe["inputs"].values()) == set(document["stages"].values())
    ]
    assert committed.facts["versions"]["torch"] == version("torch")
    assert document["test"]["best"] == result.test.best


def test_the_result_records_the_texts_of_its_perplexities(finished, workshop):
    """Half of the 2000 words are for calibration, a quarter for the selection, and a quarter for the test."""
    result, runtime = finished
    store = ArtifactStore(runtime.store)
    measured = json.loads(store.read(result.artifact, RESULT_FILE))["measured on"]
    text = {
        "corpus": str(workshop.text),
        "text_sha256": hashlib.sha256(workshop.text.read_bytes()).hexdigest(),
        "text_tokens": 2000,
        "seqlen": 16,
        "text_starts_with_bos": False,
        "dtype": "float32",
        "loss_dtype": "float32",
    }
    conventions = {text.pop("convention") for text in measured.values()}
    assert len(conventions) == 1
    assert measured == {
        "selection": text | {"part_tokens": [1000, 1500], "windows": 4},
        "test": text | {"part_tokens": [1500, 2000], "windows": 3},
    }


def test_a_search_is_calibrated_on_a_mix_and_shows_each_of_its_texts(workshop, prefect_backend, tmp_path):
    """The selection uses a text of the mix, which gives it the same part as to a search without a mix."""
    model, chat = tmp_path / "chat model", tmp_path / "chat.jsonl"
    shutil.copytree(workshop.model, model)
    template = "{% for message in messages %}{{ message.role + ' ' + message.content + ' ' }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5 w6 w7"}]
    chat.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(10)))
    mix = f"file:{workshop.text}:4,file:{chat}:2"
    settings = workshop.settings(model=str(model), calibration=mix)
    runtime = SearchRuntime(store=str(tmp_path / "store"))
    result = search(settings, runtime)
    store = ArtifactStore(runtime.store)
    text = {"corpus": str(workshop.text), "text_tokens": 2000, "part_tokens": [0, 1000], "windows": 4}
    chats = {"corpus": str(chat), "text_tokens": 90, "part_tokens": [0, 90], "windows": 2}
    rows = json.loads(store.read(result.artifact, RESULT_FILE))["calibration mix"]
    hashes = [row.pop("text_sha256") for row in rows]
    shares = [(text, 2 / 3), (chats, 1 / 3)]
    assert rows == [{**facts, "seqlen": 16, "share": share} for facts, share in shares]
    assert hashes[0] == hashlib.sha256(workshop.text.read_bytes()).hexdigest()
    page, card = Path(result.report).read_text(), Path(result.pruned, "README.md").read_text()
    for digest in hashes:
        assert digest in page
        assert digest in card
    assert "| chat.jsonl | 2 x 16 | 33.3 | 0 to 90 of 90 |" in card
    assert str(tmp_path) not in card
    assert "66.7 %</td><td>0 to 1,000</td>" in page
    windows = read_input_ids(store, result.stages["calibration"])
    words = [0, *(int(word[1:]) + 1 for word in workshop.text.read_text().split()[:1000])]
    runs = {tuple(words[start : start + 16]) for start in range(len(words))}
    assert [tuple(window) in runs for window in windows.tolist()] == [True, False, True, True, False, True]
    assert search(settings, runtime).built == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": [0.6]}, r"beta 0.6 is outside the legal range \[0, 0.50000\]"),
        ({"betas": None, "beta_step": 0.001}, "at most 255"),
        ({"model": "recurrent"}, "rwkv passes more than hidden states"),
        ({"model": "short"}, "a window has 16 tokens, but gpt2 has learned 8 positions"),
        (
            {"model": "narrow"},
            "token ids up to 96 of the text .*text.txt, but the model's embedding has 50 rows",
        ),
        ({"model": "mute"}, "mute has no tokenizer"),
        ({"model": "nowhere"}, "no such model|neither a file or folder"),
        ({"seqlen": 400}, r"1000 tokens, but 6 x 400 = 2400 are needed"),
        ({"selection_windows": 32}, r"500 tokens, but 32 x 16 = 512 are needed"),
        (
            {"selection_windows": "auto", "calibration_windows": "auto", "seqlen": 300},
            r"500 tokens, but 2 x 300 = 600 are needed",
        ),
        ({"calibration": "nowhere.txt"}, "there is no corpus at nowhere.txt"),
        (
            {"calibration": "chat.jsonl"},
            "chat.jsonl contains conversations, but the model's tokenizer has no chat template",
        ),
    ],
)
def test_a_search_that_cannot_work_is_refused_before_the_import(
    workshop, prefect_backend, tmp_path, changes, message
):
    if changes.get("model") in ("recurrent", "short", "narrow", "mute"):
        changes = {"model": str(workshop.folder / changes["model"])}
    if changes.get("calibration") == "chat.jsonl":
        (tmp_path / "chat.jsonl").write_text('{"prompt": "w1", "completion": "w2"}')
        changes = {"calibration": str(tmp_path / "chat.jsonl")}
    store = str(tmp_path / "store")
    with pytest.raises((ValueError, OSError), match=message):
        search(workshop.settings(**changes), SearchRuntime(store=store))
    assert list(ArtifactStore(store).artifacts()) == []


def test_a_missing_device_is_refused(workshop, prefect_backend, tmp_path):
    runtime = SearchRuntime(store=str(tmp_path / "store"), device="xpu:7")
    with pytest.raises(ValueError, match="cannot compute on device 'xpu:7'"):
        search(workshop.settings(), runtime)


@pytest.mark.parametrize(
    "changes", [{"sparsity": 1.5}, {"sparsty": 0.5}, {"pruner": {"method": "wanda", "blocks": 3}}]
)
def test_prefect_refuses_invalid_parameters(workshop, prefect_backend, tmp_path, changes):
    with pytest.raises(ParameterTypeError, match=next(iter(changes))):
        search(settings=workshop.parameters(**changes), runtime={"store": str(tmp_path / "store")})


def test_a_run_is_named_after_model_and_sparsity(finished, workshop):
    state = search(workshop.settings(), finished[1], return_state=True)
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
    assert run.state.is_completed()
    assert run.name == "model at 0.5"


@pytest.mark.parametrize("windows", [{}, {"calibration_windows": 4, "selection_windows": None}])
def test_a_deployment_accepts_the_required_settings_alone_and_any_number_of_windows(prefect_backend, windows):
    deployment = search.to_deployment("least", entrypoint_type=EntrypointType.MODULE_PATH).apply()
    parameters = {
        "settings": {"model": "demo", "sparsity": 0.6, **windows},
        "runtime": {"store": "memory://unused"},
    }
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(deployment, parameters=parameters)
        assert client.read_flow_run(run.id).parameters["settings"] == parameters["settings"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparsity": 2}, "sparsity"),
        ({"calibration_windows": "some"}, "calibration_windows"),
        ({"sparsty": 0.5}, "sparsty"),
        ({"pruner": {"method": "random"}}, "pruner"),
    ],
)
def test_a_deployment_refuses_invalid_parameters_when_a_run_is_created(
    prefect_backend, workshop, changes, named
):
    deployment = search.to_deployment("checked", entrypoint_type=EntrypointType.MODULE_PATH).apply()
    parameters = {"settings": workshop.parameters(**changes), "runtime": {"store": "memory://unused"}}
    with (
        get_client(sync_client=True) as client,
        pytest.raises(PrefectHTTPStatusError, match=f"409[^$]*{named}"),
    ):
        client.create_flow_run_from_deployment(deployment, parameters=parameters)


def test_a_search_without_export_reuses_a_search_with_export_and_has_no_model(run_search, workshop, finished):
    chosen = run_search(export=False)
    assert chosen.pruned is None
    assert "export" not in chosen.stages
    assert chosen.built == ()
    assert (chosen.selection, chosen.test) == (finished[0].selection, finished[0].test)
    assert look_up(ArtifactStore(finished[1].store), workshop.settings(export=False)).missing == []


@pytest.fixture
def terse_model(tmp_path) -> str:
    """A model with four tiny layers, and a tokenizer with one token per phrase of the built-in text, for speed."""
    phrases = Counter(re.findall(PHRASE, BUILTIN))
    words = {"<unk>": 0} | {phrase: n for n, (phrase, _) in enumerate(phrases.most_common(96), 1)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(PHRASE), "removed", invert=True)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "vocab_size": 97}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=2048))
    model.save_pretrained(tmp_path / "terse")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "terse")
    return str(tmp_path / "terse")


def test_a_model_a_sparsity_and_a_store_are_enough(terse_model, prefect_backend, tmp_path):
    """Half of the built-in text is for calibration, a quarter each for selection and test, in windows of 2048 tokens."""
    tokens = len(re.findall(PHRASE, BUILTIN))
    settings, runtime = Search(model=terse_model, sparsity=0.97), SearchRuntime(store=str(tmp_path / "store"))
    result = search(settings, runtime)
    windows = {role: result.stages[role].facts["windows"] for role in ("calibration", "selection", "test")}
    assert windows == {
        "calibration": tokens // 2 // 2048,
        "selection": tokens // 4 // 2048,
        "test": tokens // 4 // 2048,
    }
    assert result.selection.verdict
    assert result.pruned is not None
    numbers = {"calibration_windows": windows["calibration"], "selection_windows": windows["selection"]}
    same = search(settings.model_copy(update=numbers), runtime)
    assert same.built == ()
    assert keys_of(same) == keys_of(result)
    assert {stage.state for stage in plan_search(settings, runtime).stages} == {"in the store"}
