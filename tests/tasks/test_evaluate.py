"""Evaluate: the test perplexities, compared with transformers, taken once and by nobody else."""

import math
from statistics import fmean

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from layerwise.scoring.perplexity import perplexity
from layerwise.storage.files.errors import Corrupt
from layerwise.tasks.capture import DENSE_PERPLEXITY
from layerwise.tasks.evaluate import read_test
from layerwise.tasks.sample_tokens import TOKENS_FILE

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SMALL_OPT = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
MODES = pytest.mark.parametrize("mode", ["dense", "sequential"])


@MODES
def test_the_three_perplexities_are_those_of_the_three_models(small_run, mode):
    run = small_run(calibration_mode=mode)
    uniform, best = run.branch(0.0, 0.25)
    test = read_test(run.store, run.evaluate(0.0, 0.25))
    models = {
        "dense": run.transformers_model(),
        "uniform": run.exported_model(uniform),
        "best": run.exported_model(best),
    }
    losses = {name: torch.tensor(run.losses(model, "test")) for name, model in models.items()}
    assert test.windows == 2
    for name, values in losses.items():
        assert getattr(test, name) == pytest.approx(values.mean().exp().item(), rel=1e-5)
    assert test.gain.mean == pytest.approx((losses["best"] - losses["uniform"]).mean().item(), abs=1e-5)
    assert test.gain.mean == pytest.approx(math.log(test.best / test.uniform))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_streamed_perplexities_are_those_of_the_model_in_memory(small_run, llama, family):
    """On a LLaMA of SmolLM2-135M's size, whose embedding is its head; and on a small OPT, with biases and positions."""
    if family == "llama":
        model: PreTrainedModel = llama(**SMOLLM2)
    else:
        model = OPTForCausalLM(OPTConfig(**SMALL_OPT))
    run = small_run(model)
    dense = float(run.capture().facts[DENSE_PERPLEXITY])
    assert dense == pytest.approx(in_memory(run, run.transformers_model()), rel=1e-4)
    (lane,) = run.branch(0.0)
    assert perplexity(lane.losses) == pytest.approx(in_memory(run, run.exported_model(lane)), rel=1e-4)


def in_memory(run, model) -> float:
    """Perplexity on the selection windows."""
    return math.exp(fmean(run.losses(model, "selection")))


def test_where_uniform_is_the_best_it_is_scored_once(small_run, computed_layers):
    run = small_run()
    run.capture()
    computed_layers.clear()
    artifact = run.evaluate(0.0, 0.0)
    test = read_test(run.store, artifact)
    assert test.best == test.uniform
    assert test.gain is None
    assert {name.split("/")[0] for name in artifact.files} == {"dense", "uniform", "test.json"}
    assert computed_layers == [0, 1, 2]


def test_perplexities_are_facts_too(small_run):
    run = small_run()
    artifact = run.evaluate(0.0, 0.25)
    test = read_test(run.store, artifact)
    assert artifact.facts["dense"] == test.dense
    assert artifact.facts["uniform"] == test.uniform
    assert artifact.facts["best"] == test.best


def test_nothing_but_the_evaluation_needs_the_test_windows(small_run):
    run = small_run()
    run.store.fs.rm(f"{run.store.root}/{run.windows['test'].files[TOKENS_FILE].path}")
    run.export(run.branch(0.25)[0])
    with pytest.raises(Corrupt, match="is missing"):
        run.evaluate(0.0, 0.25)


def test_the_test_is_taken_once(small_run, computed_layers):
    run = small_run()
    first = run.evaluate(0.0, 0.25)
    computed_layers.clear()
    assert run.evaluate(0.0, 0.25) == first
    assert computed_layers == []


@MODES
def test_an_interrupted_evaluation_goes_on_from_its_last_boundary(
    small_run, another_store, dying_at, computed_layers, mode
):
    run = small_run(calibration_mode=mode)
    run.capture()
    computed_layers.clear()
    with dying_at("layerwise.tasks.lanes.layer_boundaries.BoundaryClock.due", call=3):
        run.evaluate(0.0, 0.25, boundary_layers=1)
    computed_layers.clear()
    resumed = run.evaluate(0.0, 0.25, boundary_layers=1)
    assert computed_layers == [2]
    undisturbed = small_run(run.folder, another_store(), calibration_mode=mode)
    assert resumed.content == undisturbed.evaluate(0.0, 0.25).content
