"""Calibration on the responses of conversations: statistics, recovery and distillation count only their tokens."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from layerwise.flows.distill import Distill, distill
from layerwise.flows.runtime import Runtime, SearchRuntime
from layerwise.flows.search import search
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.tasks.results.distillation import read_distillation
from layerwise.tasks.results.roles import lane_role
from layerwise.tasks.results.search_result import RESULT_FILE
from layerwise.tasks.results.summary import sentence_on_test
from layerwise.tasks.texts.token_windows import read_input_ids

RESPONSE = torch.tensor([5, 6, 7, 8])  # token ids of "w4 w5 w6 w7", which no prompt has


@pytest.fixture(scope="module")
def chat(workshop, tmp_path_factory):
    """A folder with a model that has a chat template, and conversations."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(workshop.model, folder / "model")
    template = "{% for message in messages %}{{ message.role + ' ' + message.content + ' ' }}{% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(template)

    def write(name, prompt):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "w4 w5 w6 w7"}]
        (folder / name).write_text("\n".join(json.dumps({"messages": turns}) for _ in range(24)))

    write("chat.jsonl", "w1 w2 w3")
    write("long.jsonl", " ".join(["w1"] * 40))
    return folder


@pytest.fixture(scope="module")
def run(workshop, chat, prefect_backend, tmp_path_factory):
    """Return a function that runs a search that calibrates on responses, and the location of its store."""
    store = str(tmp_path_factory.mktemp("responses") / "store")

    def search_with(**changes):
        texts = {"model": str(chat / "model"), "calibration": str(chat / "chat.jsonl"), "betas": [0.1]}
        settings = workshop.settings(**texts | {"calibrate_on": "responses"} | changes)
        return search(settings, SearchRuntime(store=store))

    return search_with, store


def counted_by_hand(store, result):
    return torch.isin(read_input_ids(store, result.stages["calibration"]), RESPONSE)


def test_statistics_are_sums_over_the_tokens_of_responses(run, chat):
    search_with, place = run
    result, store = search_with(), ArtifactStore(place)
    mask, input_ids = counted_by_hand(store, result), read_input_ids(store, result.stages["calibration"])
    model = AutoModelForCausalLM.from_pretrained(chat / "model").eval()
    sums = {}
    for name in ("0.self_attn.q_proj", "2.mlp.down_proj"):
        model.get_submodule(f"model.layers.{name}").register_forward_pre_hook(
            lambda module, inputs, name=name: sums.update({name: inputs[0][mask].double().square().sum(0)})
        )
    with torch.no_grad():
        model(input_ids=input_ids)
    for name, expected in sums.items():
        layer, _, linear = name.partition(".")
        rows = read_table(
            store, result.stages["capture"], f"statistics/layer-0000{layer}.parquet"
        ).to_pylist()
        found = [row for row in rows if row["linear"] == linear]
        assert [row["sum_of_squares"] for row in found] == pytest.approx(expected.tolist(), rel=1e-4)
        assert {row["tokens"] for row in found} == {int(mask.sum())}
    counted = json.loads(store.read(result.artifact, RESULT_FILE))["calibrated on responses"]
    assert counted == {"counted": int(mask.sum()), "tokens": 6 * 16}
    sentence = f"Of the 96 tokens of the calibration windows, {int(mask.sum())} counted"
    assert sentence in Path(result.report).read_text()
    assert sentence in Path(result.pruned, "README.md").read_text()


@pytest.fixture(scope="module")
def sequential(run, chat):
    """A search whose selection and test text are conversations too."""
    texts = {"selection": str(chat / "chat.jsonl"), "selection_windows": 3}
    return run[0](calibration_mode="sequential", export=False, **texts)


def test_a_test_text_of_conversations_also_has_the_perplexity_of_its_responses(run, chat, sequential):
    store = ArtifactStore(run[1])
    input_ids = read_input_ids(store, sequential.stages["test"])
    with torch.no_grad():
        logits = (
            AutoModelForCausalLM.from_pretrained(chat / "model").eval()(input_ids=input_ids).logits[:, :-1]
        )
    targets = input_ids[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")[torch.isin(targets, RESPONSE)]
    assert sequential.test.responses.dense == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    assert sequential.test.responses.tokens == len(losses)
    assert f"Responses alone, {len(losses)} tokens: dense" in sentence_on_test(sequential.test)
    assert "perplexity, responses in the test text" in Path(sequential.report).read_text()


def test_lanes_that_calibrate_themselves_count_the_same_tokens(run, sequential):
    result, store = sequential, ArtifactStore(run[1])
    lane = result.stages[lane_role(0.1, 0.0)]
    tokens = read_table(store, lane, "statistics/layer-00001.parquet")["tokens"].to_pylist()
    assert set(tokens) == {int(counted_by_hand(store, result).sum())}


def test_all_tokens_of_plain_texts_in_a_mix_count(run, workshop, chat):
    search_with, place = run
    mix = f"file:{workshop.text}:4,file:{chat / 'chat.jsonl'}:2"
    result, store = search_with(calibration=mix, pruner="sparsegpt", export=False), ArtifactStore(place)
    mask = counted_by_hand(store, result)
    mask[[0, 2, 3, 5]] = True  # the windows of the plain text, which is shown by the order of the mix
    assert result.stages["grams"].facts["calibration tokens"] == int(mask.sum())
    assert result.stages["capture"].facts["calibration tokens"] == int(mask.sum())


def test_recovery_and_distillation_count_only_responses(run):
    search_with, place = run
    result, store = search_with(recover="refit"), ArtifactStore(place)
    assert "fitted on the responses in 5 windows" in result.recovery_text
    whole = search_with(recover="refit", calibrate_on="all")
    assert result.recovery.dense.calibration != whole.recovery.dense.calibration
    folder = distill(Distill(search=result.artifact.key, steps=3, held_out=2), Runtime(store=place))
    distillation = read_distillation(store, folder)
    mask = counted_by_hand(store, result)
    assert 0 < distillation.tokens < 3 * 16
    assert distillation.tokens <= int(mask.sum(dim=1).topk(3).values.sum())
    assert "only the tokens of responses count" in (Path(store.location(folder)) / "README.md").read_text()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (
            "text.txt",
            "calibrate_on is responses, but .*text.txt has no conversations.*set calibrate_on to all",
        ),
        (
            "long.jsonl",
            r"[2-6] of 6 windows of 16 tokens of .*long.jsonl have no response.*Use longer windows",
        ),
    ],
)
def test_texts_without_responses_are_refused_before_any_work(
    workshop, chat, prefect_backend, tmp_path, calibration, message
):
    text = workshop.text if calibration == "text.txt" else chat / calibration
    settings = workshop.settings(model=str(chat / "model"), calibration=str(text), calibrate_on="responses")
    runtime = SearchRuntime(store=str(tmp_path / "store"))
    with pytest.raises(ValueError, match=message):
        search(settings, runtime)
    assert not list(ArtifactStore(runtime.store).artifacts())
