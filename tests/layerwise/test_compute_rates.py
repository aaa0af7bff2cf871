"""Rates of computation: every part of a search's work takes time, for layers of all kinds and for all pruners."""

from dataclasses import astuple

import pytest
import torch

from layerwise.compute_rates import measure_compute
from layerwise.pruners.alps import ALPS
from layerwise.pruners.dsnot import DSnoT
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.pruners.wanda import Wanda
from layerwise.pruners.wanda_swaps import WandaSwaps

FAMILIES = ("llama", "gemma2-window", "recurrent-gemma", "bamba", "phi3", "opt-projected", "gpt2", "falcon")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("layerwise.compute_rates.WARM", 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_all_kinds_are_measured(tiny_model, family):
    tiny = tiny_model(family)
    model = tiny.streamed()
    for index, weights in enumerate(tiny.layers()):
        rates = measure_compute(model, index, weights, 16, Wanda(), [0.4, 0.5])
        assert min(astuple(rates)) > 0


@pytest.mark.parametrize("pruner", [Wanda(), Magnitude(), WandaSwaps(), DSnoT(), SparseGPT(), ALPS()])
@pytest.mark.parametrize("group", [None, 4])
def test_all_pruners_are_measured(tiny_model, pruner, group):
    tiny = tiny_model("llama")
    rates = measure_compute(tiny.streamed(), 0, tiny.layers()[0], 16, pruner, [0.25, 0.5], group)
    assert min(astuple(rates)) > 0


def test_a_layer_that_takes_too_long_runs_on_a_part_of_a_window(tiny_model, monkeypatch):
    monkeypatch.setattr("layerwise.compute_rates.FEW_TOKENS", 4)
    monkeypatch.setattr("layerwise.compute_rates.LONGEST", 0.0)
    tiny = tiny_model("llama")
    model = tiny.streamed(torch.float32)
    assert measure_compute(model, 0, tiny.layers()[0], 16, Wanda(), [0.5]).layer > 0
    assert max(tokens for _, tokens in model._arguments) == 4
