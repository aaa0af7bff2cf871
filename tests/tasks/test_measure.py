"""Measure: scores for allocators, with and without an interruption; the same for Gram matrices."""

from importlib import import_module

import pytest

from layerwise.allocators.alpha_pruning import AlphaPruning, tail_exponent
from layerwise.allocators.lsa import LSA
from layerwise.allocators.owl import OWL
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.tasks.measure import measure, read_scores
from layerwise.tasks.running.execution import Execution


def scores(run, allocator, granularity="layer", **execution):
    inputs = run.inputs()
    where = Execution(**execution)
    how = inputs.capture, inputs.grams, allocator, granularity
    return read_scores(run.store, measure.fn(run.store, run.checkpoint, *how, run.linears, where))


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
