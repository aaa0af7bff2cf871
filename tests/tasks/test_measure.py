"""Measure: scores for allocators, with and without an interruption; the same for Gram matrices."""

from importlib import import_module

import pytest
import torch

from layerwise.allocators.alpha_pruning import AlphaPruning, tail_exponent
from layerwise.allocators.global_threshold import Global
from layerwise.allocators.lamp import LAMP, lamp_scores
from layerwise.allocators.lsa import LSA
from layerwise.allocators.owl import OWL
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.pruners.wanda import Wanda
from layerwise.tasks.lanes.statistics_table import read_statistics
from layerwise.tasks.measure import measure, read_scores, threshold_of
from layerwise.tasks.running.execution import Execution


def scores(run, allocator, granularity="layer", **execution):
    inputs = run.inputs()
    where = Execution(**execution)
    how = inputs.capture, inputs.grams, allocator, granularity
    threshold = threshold_of(allocator, run.pruning.pruner, run.pruning.target)
    measured = measure.fn(run.store, run.checkpoint, *how, run.linears, where, threshold)
    return read_scores(run.store, measured)


def test_the_exponent_of_a_layer_is_the_mean_over_its_linears(small_run):
    run = small_run()
    by_linear = scores(run, AlphaPruning(), granularity="linear")
    weights = [
        layer[linear.weight_name].clone()
        for layer, linears in zip(run.checkpoint.layers(), run.linears, strict=True)
        for linear in linears
    ]
    assert by_linear == pytest.approx([tail_exponent(weight) for weight in weights])
    by_layer = scores(run, AlphaPruning())
    assert by_layer == pytest.approx([sum(by_linear[7 * n : 7 * n + 7]) / 7 for n in range(3)])


@pytest.mark.parametrize("allocator", [OWL(), LSA()])
def test_an_interrupted_measurement_resumes_at_the_next_layer(
    small_run, another_store, dying_at, monkeypatch, allocator
):
    run = small_run(pruner=SparseGPT())
    whole = scores(run, allocator)
    again = small_run(run.folder, store=another_store(), pruner=SparseGPT())
    with dying_at("layerwise.tasks.measure._scores", 3):
        scores(again, allocator, boundary_layers=1)
    measured = []
    original = import_module("layerwise.tasks.measure")._scores

    def counted(*arguments):
        measured.append(arguments[4])
        return original(*arguments)

    monkeypatch.setattr("layerwise.tasks.measure._scores", counted)
    assert scores(again, allocator) == whole
    assert measured == [2]


@pytest.mark.parametrize(
    ("allocator", "pruner"), [(Global(), Magnitude()), (Global(), Wanda()), (LAMP(), Wanda())]
)
def test_a_threshold_removes_the_lowest_scores_of_the_whole_model_also_after_interruptions(
    small_run, another_store, dying_at, allocator, pruner
):
    run = small_run(pruner=pruner)
    capture, every, owner, layer_of = run.capture(), [], [], []
    for index, (layer, linears) in enumerate(zip(run.checkpoint.layers(), run.linears, strict=True)):
        statistics = read_statistics(run.store, capture, index)
        for linear in linears:
            score = layer[linear.weight_name].clone().abs().float()
            if isinstance(allocator, LAMP):
                score = torch.cat([*lamp_scores(score)])
            elif isinstance(pruner, Wanda):
                score = score * statistics[linear.name].norms
            every.append(score.reshape(-1))
            owner.append(torch.full((score.numel(),), len(layer_of)))
            layer_of.append(index)
    scored, owner = torch.cat(every), torch.cat(owner)
    removed = owner[scored.topk(round(run.pruning.target * len(scored)), largest=False).indices]
    sizes = owner.bincount()
    expected = removed.bincount(minlength=len(sizes)) / sizes
    whole = scores(run, allocator, granularity="linear")
    by_linear = torch.tensor(whole)
    assert torch.allclose(by_linear, expected, atol=2e-3)  # equal scores are shared out
    assert float((by_linear * sizes).sum()) == pytest.approx(run.pruning.target * len(scored), rel=1e-6)
    of_layers = torch.tensor(layer_of)
    by_layer = torch.zeros(3).index_add(0, of_layers, by_linear * sizes) / of_layers.bincount(weights=sizes)
    assert scores(run, allocator) == pytest.approx(by_layer.tolist(), rel=1e-6)

    again = small_run(run.folder, store=another_store(), pruner=pruner)
    for call in (2, 3):  # at the second layer of the first pass, and at the first layer of the second pass
        with dying_at("layerwise.tasks.measure._compared_scores", call):
            scores(again, allocator, granularity="linear", boundary_layers=1)
    assert scores(again, allocator, granularity="linear") == whole


def test_an_interrupted_capture_of_gram_matrices_resumes_at_the_saved_layer(
    small_run, another_store, dying_at, computed_layers
):
    run = small_run(pruner=SparseGPT())
    whole = run.grams()
    again = small_run(run.folder, store=another_store(), pruner=SparseGPT())
    with dying_at("layerwise.tasks.capture_grams.write_grams", 3):
        again.grams(boundary_layers=1)
    computed_layers.clear()
    assert again.grams().content == whole.content
    assert computed_layers == [2]
