"""Plan: lists the remaining work before, during and after a search, and writes nothing."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from layerwise.flows.cli.tables import show_plan
from layerwise.flows.plan import plan_search
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.wanda import Wanda
from layerwise.storage.store import ArtifactStore
from tests.small_search import small_search

STAGES = [
    "import_checkpoint",
    "sample_tokens: calibration",
    "sample_tokens: selection",
    "sample_tokens: test",
]
STAGES += ["capture", "branch: 3 betas", "select", "export", "evaluate"]
QWEN3_30B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
QWEN3_30B |= {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


def to_do(plan):
    return [stage.name for stage in plan.stages if stage.to_do]


def stage_of(plan, name):
    (stage,) = (stage for stage in plan.stages if stage.name.startswith(name))
    return stage


def test_a_plan_for_an_empty_store_lists_every_stage_and_writes_nothing(workshop, fresh_store_url):
    store = ArtifactStore(fresh_store_url)
    plan = plan_search(workshop.settings(), SearchRuntime(store=fresh_store_url))
    assert [stage.name for stage in plan.stages] == STAGES
    assert to_do(plan) == STAGES
    assert plan.betas == (0.0, 0.1, 0.25)
    assert {stage.seconds for stage in plan.stages} == {None}
    assert list(store.artifacts()) == []
    if not fresh_store_url.startswith("s3"):  # a bucket has no folders that could be left empty
        assert not store.fs.exists(store.root)


def test_a_plan_of_an_interrupted_search_lists_only_the_missing_stages(
    workshop, prefect_backend, tmp_path, monkeypatch
):
    runtime = SearchRuntime(store=str(tmp_path / "store"))

    def dying(*_):
        raise OSError("the machine died")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the machine died"):  # noqa: PT012
        patch.setattr("layerwise.tasks.lanes.lane_group.read_statistics", dying)
        search(workshop.settings(), runtime)
    plan = plan_search(workshop.settings(), runtime)
    assert to_do(plan) == ["branch: 3 betas", "select", "export", "evaluate"]
    assert stage_of(plan, "branch").state == "prune and score 3 of them"


def test_a_plan_of_a_finished_search_lists_no_work(workshop, finished):
    plan = plan_search(workshop.settings(), finished[1])
    assert to_do(plan) == []
    assert {(stage.state, stage.reads, stage.writes) for stage in plan.stages} == {("in the store", 0, 0)}


def test_a_plan_shows_the_recovery_and_its_memory(workshop, fresh_store_url):
    settings = workshop.settings(recover="train", recover_windows=4)
    plan = plan_search(settings, SearchRuntime(store=fresh_store_url))
    assert [stage.name for stage in plan.stages] == [*STAGES[:-2], "recover", "export", "evaluate"]
    assert stage_of(plan, "branch").state == "prune, refit and score 3 of them"
    recovering = stage_of(plan, "recover")
    assert recovering.reads == 2 * stage_of(plan, "export").reads
    assert 0 < recovering.writes < 2 * stage_of(plan, "export").writes
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # of a layer
    # Dense and new weights in float32 and a mask; Adam's 20 bytes.
    assert plan.memory["recovery"] == weights * (9 + 20)
    refit = plan_search(workshop.settings(recover="refit"), SearchRuntime(store=fresh_store_url))
    assert refit.memory["recovery"] == weights * 9 + 12 * 48**2 + 20 * 32 * 48


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"betas": [0.1, 0.15, 0.25]}, ["branch: 4 betas", "select", "export", "evaluate"]),
        ({"test_windows": 1}, ["sample_tokens: test", "evaluate"]),
        (
            {"seed": 7},
            ["sample_tokens: calibration", "capture", "branch: 3 betas", "select", "export", "evaluate"],
        ),
    ],
)
def test_a_changed_setting_puts_the_stages_that_depend_on_it_on_the_plan(workshop, finished, changes, left):
    plan = plan_search(workshop.settings(**changes), finished[1])
    assert to_do(plan) == left
    if "betas" in changes:
        assert stage_of(plan, "branch").state == "prune and score 1 of them"


def test_a_plan_writes_nothing_into_an_existing_store(workshop, finished):
    store = ArtifactStore(finished[1].store)
    before = store.fs.find(store.root, detail=True)
    plan_search(workshop.settings(seed=8), finished[1])
    assert store.fs.find(store.root, detail=True) == before


def test_planned_bytes_match_those_that_the_search_reads_and_writes(workshop, prefect_backend, tmp_path):
    runtime = SearchRuntime(store=str(tmp_path / "store"))
    settings = workshop.settings(retain="all")
    plan = plan_search(settings, runtime)
    result = search(settings, runtime)
    assert sum(stage.reads for stage in plan.stages) == result.bytes_read
    capture = result.stages["capture"]
    # The header of a Parquet file is larger than the statistics of three tiny layers; hidden states dominate.
    assert stage_of(plan, "capture").writes == pytest.approx(capture.size, rel=0.25)
    weights = sum(
        f.size for name, f in result.stages["export"].files.items() if name.endswith(".safetensors")
    )
    assert stage_of(plan, "export").writes == pytest.approx(weights, rel=0.1)


def test_lanes_that_calibrate_themselves_write_their_statistics(workshop, tmp_path):
    runtime = SearchRuntime(store=str(tmp_path / "store"))
    assert stage_of(plan_search(workshop.settings(), runtime), "branch").writes == 0
    plan = plan_search(workshop.settings(calibration_mode="sequential"), runtime)
    channels = 3 * (3 * 32 + 32 + 2 * 32 + 48)  # q, k, v; o; gate, up; down
    assert stage_of(plan, "branch").writes == 2 * 3 * 20 * channels


def test_memory_follows_from_the_settings(workshop, tmp_path):
    def memory(gib=4.0, **changes):
        return plan_search(
            workshop.settings(**changes), SearchRuntime(store=str(tmp_path), hidden_states_gib=gib)
        )

    window = 16 * 32 * 4  # tokens, width, bytes
    plan = memory()
    # Three betas with four windows each.
    assert plan.memory["hidden states"] == 3 * 4 * window
    assert plan.resume_point == plan.memory["hidden states"]
    assert plan.resume_bytes_an_hour == 12 * plan.resume_point  # every five minutes
    assert plan.resume_bytes_a_stage == 0
    every_second = plan_search(workshop.settings(), SearchRuntime(store=str(tmp_path), boundary_layers=2))
    assert every_second.resume_bytes_a_stage == plan.resume_point  # the model has three layers
    assert plan.scratch == 0
    layer = sum(
        p.nbytes for p in AutoModelForCausalLM.from_pretrained(workshop.model).model.layers[0].parameters()
    )
    assert plan.memory["layer in use"] == plan.memory["layer arriving"] == layer
    sequential = memory(calibration_mode="sequential")
    assert sequential.memory["hidden states"] == 3 * (6 + 4) * window
    elsewhere = SearchRuntime(store=str(tmp_path), device="cuda", device_memory_gib=10 * window / 2**30)
    on_device = plan_search(workshop.settings(), elsewhere)
    placed = on_device.device_memory["hidden states"], on_device.memory["hidden states"]
    assert placed == (8 * window, 4 * window)  # whole lanes
    spilled = memory(gib=2 * window / 2**30)
    assert (spilled.memory["hidden states"], spilled.scratch) == (2 * window, 10 * window)
    tested = memory(test_windows=30)
    assert tested.memory["hidden states"] == 3 * 30 * window  # dense, uniform and best
    half = memory(dtype="bfloat16")
    assert half.memory["hidden states"] == plan.memory["hidden states"] / 2
    assert half.memory["layer in use"] > layer


def test_wanda_and_patterns_rank_some_rows_at_a_time_and_magnitude_a_whole_matrix(
    workshop, tmp_path, monkeypatch
):
    monkeypatch.setattr("layerwise.flows.pipeline.size_estimate.RANKED_ENTRIES", 100)

    def ranking(**changes):
        plan = plan_search(workshop.settings(**changes), SearchRuntime(store=str(tmp_path)))
        return plan.memory["ranking"]

    largest = 48 * 32
    assert ranking(pruner=Magnitude()) - ranking(pruner=Wanda()) == 14 * (largest - 100)
    assert ranking(pruner=Magnitude(), sparsity=0.5, pattern="N:8") == ranking(pruner=Wanda())


def test_the_memory_for_transfers_counts_if_the_store_is_remote(workshop, tmp_path):
    near = plan_search(workshop.settings(), SearchRuntime(store=str(tmp_path)))
    far = plan_search(workshop.settings(), SearchRuntime(store=f"memory://{tmp_path.name}"))
    assert far.memory == {**near.memory, "transfers": 512 << 20}


def test_the_duration_of_a_resume_point_is_shown_if_it_is_known(workshop, tmp_path, capsys):
    plan = plan_search(workshop.settings(), SearchRuntime(store=str(tmp_path)))
    show_plan(Console(width=500), plan)
    show_plan(Console(width=500), replace(plan, resume_point_seconds=90))
    assert re.findall(r"of the largest stage: [\d.]+ kB( in 1\.5 min)?;", capsys.readouterr().out) == [
        "",
        " in 1.5 min",
    ]


def test_a_plan_counts_the_windows_of_a_text_that_is_not_tokenised_yet(workshop, tmp_path):
    """The test gets a quarter of the 2000 words, which are 31 windows of 16 tokens."""
    plan = plan_search(workshop.settings(test_windows=None), SearchRuntime(store=str(tmp_path / "store")))
    assert stage_of(plan, "sample_tokens: calibration").state == "cut 6 windows of 16 tokens"
    assert stage_of(plan, "sample_tokens: test").state == "cut 31 windows of 16 tokens"
    assert plan.memory["hidden states"] == 3 * 31 * 16 * 32 * 4
    assert not (tmp_path / "store").exists()


def test_a_model_with_another_name_for_its_width_can_be_planned(workshop, tmp_path):
    GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=97, n_positions=64)
    ).save_pretrained(tmp_path / "gpt2")
    for file in workshop.model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "gpt2")
    plan = plan_search(
        workshop.settings(model=str(tmp_path / "gpt2")), SearchRuntime(store=str(tmp_path / "store"))
    )
    assert plan.memory["hidden states"] == 3 * 4 * 16 * 32 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": [0.6]}, "outside the legal range"),
        ({"model": "recurrent"}, "rwkv passes more than hidden states"),
        ({"selection_windows": 32}, "500 tokens, but 32 x 16 = 512 are needed"),
    ],
)
def test_a_plan_refuses_settings_that_the_search_would_refuse(workshop, tmp_path, changes, message):
    if "model" in changes:
        changes = {"model": str(workshop.folder / "recurrent")}
    with pytest.raises(ValueError, match=message):
        plan_search(workshop.settings(**changes), SearchRuntime(store=str(tmp_path / "store")))
    assert not (tmp_path / "store").exists()


def test_a_plan_shows_the_size_of_the_second_moments_of_the_widest_linear(workshop, tmp_path):
    """The down_proj has 48 inputs, hence 48 x 48 numbers of 4 bytes."""
    plan = plan_search(workshop.settings(pruner="sparsegpt"), SearchRuntime(store=str(tmp_path / "store")))
    assert "second moments (mlp.down_proj: 9.22 kB a matrix)" in plan.memory


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_a_measured_plan_has_a_time_for_every_stage_that_computes(workshop, fresh_store_url, pruner):
    store = ArtifactStore(fresh_store_url)
    plan = plan_search(workshop.settings(pruner=pruner), SearchRuntime(store=fresh_store_url), measure=True)
    computing = [stage for stage in plan.stages if stage.reads]
    assert len(computing) == (5 if pruner == "wanda" else 6)
    assert all(stage.seconds > 0 for stage in computing)
    assert plan.seconds == pytest.approx(sum(stage.seconds for stage in computing))
    assert "of the model at" in plan.notes[0]
    assert list(store.artifacts()) == []
    if not fresh_store_url.startswith("s3"):
        assert not store.fs.exists(store.root)


def test_stages_in_the_store_take_no_time_and_nothing_is_measured_for_a_finished_search(workshop, finished):
    done = plan_search(workshop.settings(), finished[1], measure=True)
    assert (done.measuring, done.seconds) == (None, 0)
    plan = plan_search(workshop.settings(test_windows=1), finished[1], measure=True)
    assert plan.seconds == stage_of(plan, "evaluate").seconds > 0


def test_the_time_of_a_model_that_is_converted_into_the_store_lacks_the_conversion(
    tmp_path,
):
    settings = Search(**small_search(tmp_path, layers=2))
    plan = plan_search(settings, SearchRuntime(store=str(tmp_path / "store")), measure=True)
    assert stage_of(plan, "import_checkpoint").seconds is None
    assert stage_of(plan, "capture").seconds > 0
    assert "The conversion of " in plan.notes[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has the device")
def test_a_plan_for_a_device_of_another_machine_has_its_memory_but_no_times(workshop, tmp_path):
    runtime = SearchRuntime(store=str(tmp_path), device="cuda")
    plan = plan_search(workshop.settings(dtype="bfloat16"), runtime, measure=True)
    assert plan.measuring is None
    assert plan.notes[0].startswith("No times: torch cannot compute on device 'cuda' here")
    assert plan.memory.keys() == {"layer arriving", "hidden states"}
    on_cpu = plan_search(
        workshop.settings(dtype="bfloat16"), SearchRuntime(store=str(tmp_path), device="cpu")
    )
    assert on_cpu.device_memory == {}
    assert plan.device_memory["logits of one window"] == on_cpu.memory["logits of one window"]


@pytest.mark.parametrize(
    ("pruner", "matrices", "one"),
    [
        # A factor for each matrix. In float64: the widest matrix and two panels of its rows.
        ("sparsegpt", 1, 8 * 48**2 + 2 * 8 * 256 * 48),
        # The Hessian and four inverses (a small matrix is one panel). A whole inverse, six copies of the weight, two masks.
        ("alps", 5, 4 * 48**2 + 26 * 32 * 48),
        # The matrices themselves. Seven copies of the weight, its result in float32 and three masks.
        ("wanda_swaps", 1, (7 * 4 + 4 + 3) * 32 * 48),
        # The matrices while they are captured. Eight copies of the weight, its result in float32 and two masks.
        ("dsnot", 1, (8 * 4 + 4 + 2) * 32 * 48),
    ],
)
def test_the_memory_of_pruners_that_use_second_moments(
    workshop, tmp_path, monkeypatch, pruner, matrices, one
):
    monkeypatch.setattr("layerwise.pruners.pruning_memory.kernel", lambda: "a kernel")
    plan = plan_search(workshop.settings(pruner=pruner), SearchRuntime(store=str(tmp_path / "store")))
    (moments,) = (value for name, value in plan.memory.items() if name.startswith("second moments"))
    assert moments == matrices * 4 * (6 * 32**2 + 48**2)
    assert plan.memory["pruning of one linear"] == one


def test_an_allocator_that_uses_second_moments_needs_memory_for_them(workshop, tmp_path):
    settings = workshop.settings(allocator={"method": "lsa"}, betas=None)
    plan = plan_search(settings, SearchRuntime(store=str(tmp_path / "store")))
    assert plan.memory["second moments (mlp.down_proj: 9.22 kB a matrix)"] == 4 * (6 * 32**2 + 48**2)


def folder_of_headers(folder: Path, model: str, config: PreTrainedConfig) -> Path:
    """Return a folder with a model whose tensors, as many as on the hub, have names and shapes but no values."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    header, end = {}, 0
    for name, weight in state.items():
        owner, _, fused = name.rpartition(".")
        shapes = {name: weight.shape}
        if fused in ("gate_up_proj", "down_proj"):
            experts, rows, columns = weight.shape
            halves = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
            shapes = {
                f"{owner}.{expert}.{part}.weight": (rows // len(halves), columns)
                for expert in range(experts)
                for part in halves
            }
        for stored, shape in shapes.items():
            size = 2 * math.prod(shape)
            header[stored] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
    if model == "mixtral":
        names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", ".mlp.": ".block_sparse_moe."}
        text = json.dumps(header)
        for name, stored in names.items():
            text = text.replace(name, stored)
        header = json.loads(text)
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)  # a hole takes no space
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "config", "layer_gb", "moments_gb"),
    [
        ("mixtral", MixtralConfig(num_hidden_layers=2, dtype="bfloat16"), 2.9, 7.4),
        ("qwen3-moe", Qwen3MoeConfig(**QWEN3_30B, num_hidden_layers=2, dtype="bfloat16"), 1.25, 2.6),
    ],
    ids=["two layers of Mixtral-8x7B", "two layers of Qwen3-30B-A3B"],
)
def test_a_plan_for_a_large_mixture_of_experts_knows_its_memory(
    workshop, tmp_path, model, config, layer_gb, moments_gb
):
    folder = tmp_path / "model"
    shutil.copytree(workshop.model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    path = str(folder_of_headers(folder, model, config))
    runtime = SearchRuntime(store=str(tmp_path / "store"))
    memory = plan_search(workshop.settings(model=path, pruner="sparsegpt"), runtime).memory
    assert memory["layer in use"] / 1e9 == pytest.approx(layer_gb, rel=0.01)
    (moments,) = [size for part, size in memory.items() if part.startswith("second moments")]
    # Per expert: one matrix for gate and up, one for down; and four for attention.
    assert moments / 1e9 == pytest.approx(moments_gb, rel=0.02)
