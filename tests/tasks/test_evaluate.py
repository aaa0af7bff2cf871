"""Evaluate: test perplexities agree with transformers, for one search and for several together."""

import math
from statistics import fmean

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from layerwise.scoring.perplexity import perplexity
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.tables import read_table
from layerwise.tasks.evaluate import evaluate_together
from layerwise.tasks.results.evaluation import read_test
from layerwise.tasks.results.lane_scores import ERRORS_FILE
from layerwise.tasks.results.selection import DENSE_PERPLEXITY
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.texts.token_windows import TOKENS_FILE

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
    """Test a LLaMA of SmolLM2-135M's size with a tied head, and a small OPT with biases and learned positions."""
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
    """Return the perplexity on the selection windows."""
    return math.exp(fmean(run.losses(model, "selection")))


def test_uniform_is_scored_once_if_it_is_the_best(small_run, computed_layers):
    run = small_run()
    run.capture()
    computed_layers.clear()
    artifact = run.evaluate(0.0, 0.0)
    test = read_test(run.store, artifact)
    assert test.best == test.uniform
    assert test.gain is None
    assert {name.split("/")[0] for name in artifact.files} == {"dense", "uniform", "test.json"}
    assert computed_layers == [0, 1, 2]


def test_perplexities_are_also_facts(small_run):
    run = small_run()
    artifact = run.evaluate(0.0, 0.25)
    test = read_test(run.store, artifact)
    assert artifact.facts["dense"] == test.dense
    assert artifact.facts["uniform"] == test.uniform
    assert artifact.facts["best"] == test.best


def test_only_the_evaluation_reads_the_test_windows(small_run):
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
def test_an_interrupted_evaluation_resumes_from_its_last_boundary(
    small_run, another_store, dying_at, computed_layers, mode
):
    run = small_run(calibration_mode=mode)
    run.capture()
    computed_layers.clear()
    with dying_at("layerwise.tasks.running.layer_boundaries.BoundaryClock.due", call=3):
        run.evaluate(0.0, 0.25, boundary_layers=1)
    computed_layers.clear()
    resumed = run.evaluate(0.0, 0.25, boundary_layers=1)
    assert computed_layers == [2]
    undisturbed = small_run(run.folder, another_store(), calibration_mode=mode)
    assert resumed.content == undisturbed.evaluate(0.0, 0.25).content


def together(run, *betas: float) -> None:
    uniform, *bests = run.plans((0.0, *betas))
    evaluate_together.fn(run.store, run.inputs("test"), uniform, bests, run.linears, run.pruning, Execution())


@MODES  # sequential evaluations are left to ``evaluate``
def test_evaluations_of_a_group_equal_single_evaluations(small_run, another_store, mode):
    run = small_run(calibration_mode=mode)
    alone = small_run(run.folder, another_store(), calibration_mode=mode)
    together(run, 0.0, 0.25, 0.1)
    for best in (0.0, 0.25, 0.1):
        of_group, single = run.evaluate(0.0, best), alone.evaluate(0.0, best)
        assert of_group.content == single.content
        assert read_test(run.store, of_group) == read_test(alone.store, single)
        assert of_group.facts["best"] == single.facts["best"]


def test_the_layers_are_computed_once_for_a_group_of_evaluations(small_run, computed_layers):
    run = small_run()
    run.capture()
    computed_layers.clear()
    together(run, 0.0, 0.25, 0.1)
    assert computed_layers == [0, 1, 2]
    run.evaluate(0.0, 0.1)
    together(run, 0.0, 0.25, 0.1)
    assert computed_layers == [0, 1, 2]


def test_a_single_missing_evaluation_is_left_to_evaluate(small_run, computed_layers):
    run = small_run()
    run.evaluate(0.0, 0.25)
    before = run.files()
    together(run, 0.25, 0.1)
    assert run.files() == before


def test_the_errors_of_pruned_layers_are_split_into_their_parts(small_run):
    run = small_run()
    evaluation = run.evaluate(0.0, 0.25)
    assert f"dense/{ERRORS_FILE}" not in evaluation.files
    for lane in ("uniform", "best"):
        rows = read_table(run.store, evaluation, f"{lane}/{ERRORS_FILE}").to_pylist()
        assert [row["layer"] for row in rows] == [0, 1, 2]
        assert rows[0]["factor"] is None
        for row, before in zip(rows[1:], rows, strict=False):
            assert row["arriving"] == before["accumulated"]
            assert row["factor"] == row["propagated"] / row["arriving"]
