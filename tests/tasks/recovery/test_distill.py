"""Distill: a new checkpoint with the same zeros and a lower loss, the same after any interruption."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from layerwise.tasks.pages.model_card import ModelCard
from layerwise.tasks.recovery.distill import DistillInputs, distill, distill_stage
from layerwise.tasks.recovery.student import DistillSettings, Student
from layerwise.tasks.results.distillation import newest_distilled, read_distillation
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stopping import Stopped, stopping_on_sigterm

CARD = ModelCard("tiny/llama", None, "wanda", None, "atp", (0.25, 0.5, 0.75), 0.5)
SETTINGS = DistillSettings(
    steps=6, learning_rate=0.01, batch=4, held_out=8, evaluate_every=2, patience=5, seed=0
)
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 64}
MIXTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "num_experts_per_tok": 2,
}


def qwen3_moe() -> PreTrainedModel:
    """A mixture that stores every expert in tensors of its own."""
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE, num_experts=4, moe_intermediate_size=16))


def gpt_oss() -> PreTrainedModel:
    """A mixture that stores all experts of a layer in one tensor."""
    return GptOssForCausalLM(GptOssConfig(**MIXTURE, num_local_experts=4, intermediate_size=16))


OTHER_MODELS = {
    "GPT-2, bfloat16": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)).to(torch.bfloat16),
    "Qwen3-MoE, bfloat16": lambda: qwen3_moe().to(torch.bfloat16),
    "gpt-oss, float32": gpt_oss,
}
WINDOWS = {"calibration": 40}


def inputs_of(run) -> DistillInputs:
    chosen, uniform = run.branch(0.25, 0.0)
    return DistillInputs(
        run.checkpoint,
        run.export(chosen, uniform),
        run.windows["calibration"],
        run.windows["test"],
        run.evaluate(0.0, 0.25),
        run.pruning.dtype,
    )


def distilled(run, settings=SETTINGS, **execution):
    return distill.fn(run.store, inputs_of(run), settings, CARD, Execution(**execution))


def tensors_of(run, artifact):
    files = sorted(Path(run.store.location(artifact)).glob("*.safetensors"))
    return {file.name: load_file(file) for file in files}


@pytest.fixture(params=["float32", "bfloat16", "float16", *OTHER_MODELS])
def run(request, llama, small_run):
    if request.param in OTHER_MODELS:
        return small_run(OTHER_MODELS[request.param](), windows=WINDOWS)
    dtype = getattr(torch, request.param)
    return small_run(llama(num_hidden_layers=3, tie_word_embeddings=True).to(dtype), windows=WINDOWS)


def test_only_the_kept_weights_of_pruned_linears_change(run):
    inputs, artifact = inputs_of(run), distilled(run)
    before, after = tensors_of(run, inputs.exported), tensors_of(run, artifact)
    assert before.keys() == after.keys()
    changed = 0
    for shard, tensors in before.items():
        assert tensors.keys() == after[shard].keys()
        for name, weight in tensors.items():
            found = after[shard][name]
            assert found.dtype == weight.dtype
            if torch.equal(found.view(torch.uint8), weight.view(torch.uint8)):
                continue
            changed += 1
            assert torch.equal(found == 0, weight == 0), name
    linears = json.loads(run.store.read(artifact, "sparsity.json"))["linears"]
    # Four of a layer's linears are in tensors of their own, and those of its experts in two.
    assert changed == (3 * (4 + 2) if run.checkpoint.config.model_type == "gpt_oss" else len(linears))
    same = set(inputs.exported.files) - {*before, "README.md"}
    assert all(run.store.read(artifact, name) == run.store.read(inputs.exported, name) for name in same)
    artifacts = list(run.store.artifacts())
    assert newest_distilled(artifacts, inputs.tested) == artifact
    assert newest_distilled(artifacts, inputs.exported) is None


def test_the_result_is_that_of_the_written_checkpoint(run):
    artifact = distilled(run)
    result = read_distillation(run.store, artifact)
    dense, pruned, after = result.rows
    assert after.zeros == pruned.zeros > dense.zeros == 0
    assert (pruned.test, dense.test) == (
        run.evaluate(0.0, 0.25).facts["best"],
        run.evaluate(0.0, 0.25).facts["dense"],
    )
    best = min(result.evaluations, key=lambda each: each.kl)
    assert best.kl < result.evaluations[0].kl
    assert (after.held_out, result.best_step) == (best.perplexity, best.step)
    model = AutoModelForCausalLM.from_pretrained(run.store.location(artifact)).eval()
    losses = torch.tensor(run.losses(model, "test"))
    assert after.test == pytest.approx(losses.mean().exp().item(), rel=0.02)
    card = run.store.read(artifact, "README.md").decode()
    assert f"| **this model** | test text | 2 x 12 | {after.test:.2f} |" in card
    assert "6 steps of 4 windows, 288 tokens in all" in card


@pytest.mark.parametrize("call", [1, 3, 6])
def test_an_interrupted_distillation_gives_the_files_of_an_undisturbed_one(
    small_run, another_store, dying_at, call
):
    run = small_run(windows=WINDOWS)
    with dying_at("layerwise.tasks.recovery.student.Student.train", call=call):
        distilled(run, boundary_layers=1)
    stage = distill_stage(inputs_of(run), SETTINGS, CARD)
    point = run.store.resume_point(stage)
    assert (0 if point is None else point.step) == call - 1
    undisturbed = small_run(run.folder, another_store(), windows=WINDOWS)
    assert distilled(run, boundary_layers=1).content == distilled(undisturbed).content


def test_sigterm_leaves_a_resume_point_after_the_current_step(small_run, another_store, monkeypatch):
    run = small_run(windows=WINDOWS)
    inputs_of(run)
    train = Student.train

    def interrupted(student, windows):
        if student.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return train(student, windows)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "train", interrupted)
        with stopping_on_sigterm(), pytest.raises(Stopped):
            distilled(run)
    assert run.store.resume_point(distill_stage(inputs_of(run), SETTINGS, CARD)).step == 3
    undisturbed = small_run(run.folder, another_store(), windows=WINDOWS)
    assert distilled(run).content == distilled(undisturbed).content


def test_training_is_not_repeated_after_an_interruption_of_the_writing(small_run, dying_at, monkeypatch):
    run = small_run(windows=WINDOWS)
    with dying_at("layerwise.tasks.recovery.distill.write_tensors", call=2):
        distilled(run)
    monkeypatch.delattr("layerwise.tasks.recovery.student.Student.train")
    assert read_distillation(run.store, distilled(run)).steps == SETTINGS.steps


def test_a_resume_point_holds_kept_weights_only(small_run, dying_at):
    run = small_run(windows=WINDOWS)
    with dying_at("layerwise.tasks.recovery.student.Student.train", call=2):
        distilled(run, boundary_layers=1)
    point = run.store.resume_point(distill_stage(inputs_of(run), SETTINGS, CARD))
    rows = json.loads(run.store.read(inputs_of(run).exported, "sparsity.json"))["linears"]
    kept = sum(row["weights"] - row["zeros"] for row in rows)
    stored = point.state.files["training.safetensors"].tensors
    assert sum(entry.nbytes for entry in stored.values()) == 3 * 4 * kept


def test_training_stops_without_improvement_and_the_best_weights_are_written(small_run):
    run = small_run(windows=WINDOWS)
    wild = replace(SETTINGS, learning_rate=1.0, steps=40, patience=2)
    artifact = distilled(run, wild)
    result = read_distillation(run.store, artifact)
    assert result.steps < wild.steps
    assert result.best_step + 2 * wild.evaluate_every == result.steps
    best = next(each for each in result.evaluations if each.step == result.best_step)
    assert best.kl == min(each.kl for each in result.evaluations)
    if result.best_step == 0:
        assert tensors_of(run, artifact).keys() == tensors_of(run, inputs_of(run).exported).keys()


def test_recomputed_activations_give_the_same_checkpoint(small_run, another_store, monkeypatch):
    run = small_run(windows=WINDOWS)
    kept = distilled(run)
    tight = small_run(run.folder, another_store(), windows=WINDOWS)
    inputs_of(tight)
    need = "layerwise.tasks.recovery.distillation_memory.DistillationMemory.require"
    monkeypatch.setattr(need, lambda memory, device: True)
    assert distilled(tight).content == kept.content


def test_a_model_that_does_not_fit_is_refused_before_any_work(small_run, monkeypatch):
    run = small_run(windows=WINDOWS)
    inputs_of(run)
    free = "layerwise.tasks.recovery.distillation_memory.free_memory"
    monkeypatch.setattr(free, lambda device: 10_000)
    monkeypatch.setattr("layerwise.tasks.recovery.distill.streamed_model", None)
    message = r"needs about .* of memory \(.*moments of AdamW .*\), but 10 kB are free on cpu"
    with pytest.raises(ValueError, match=message):
        distilled(run)


def test_windows_that_are_all_held_out_are_refused(small_run):
    with pytest.raises(ValueError, match="40 calibration windows, and 40 of them are to be held out"):
        distilled(small_run(windows=WINDOWS), replace(SETTINGS, held_out=40))
