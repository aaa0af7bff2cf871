"""Models that carry more than hidden states from layer to layer are searched as all others.

Gemma 4 looks up embeddings of the tokens for every layer, and its last layers use keys and values of earlier ones. Inkling 2
uses outputs of earlier layers in all later ones.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.recovery.refit import Refit
from layerwise.recovery.train import Train
from layerwise.scoring.divergence import kl_per_token
from layerwise.tasks.branch import branch
from layerwise.tasks.capture import capture_dense_states
from layerwise.tasks.recovery.recover import recover
from layerwise.tasks.running.execution import Execution
from tests.tiny_configs import tiny_config


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gemma4_text", {"calibration_mode": "sequential"}),
        ("gemma4_text", {"pruner": SparseGPT(), "recover": Train(epochs=1)}),
        ("inkling2_text", {"recover": Refit()}),
    ],
    ids=["gemma4, sequential", "gemma4, sparsegpt, train", "inkling2, refit"],
)
def test_an_interrupted_lane_has_the_losses_and_the_divergence_of_its_export(
    small_run, dying_at, model_type, settings
):
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    run = small_run(model, windows={"calibration": 40}, **settings)
    selection, where = run.windows["selection"], Execution(boundary_layers=3)
    dense = capture_dense_states.fn(run.store, run.checkpoint, selection, run.pruning.dtype, where)
    inputs = replace(run.inputs(), criterion="kl", dense_states=dense)
    plans, rest = run.plans([0.1]), (run.linears, run.pruning, where)
    with dying_at("layerwise.tasks.lanes.lane_group.losses_and_divergences", call=1):
        branch.fn(run.store, inputs, plans, *rest)
    (lane,) = branch.fn(run.store, inputs, plans, *rest)
    if run.pruning.recover is not None:
        recover.fn(run.store, inputs, plans, *rest)
    original, exported = run.transformers_model(), run.exported_model(lane)
    assert lane.losses == pytest.approx(run.losses(exported, "selection"), rel=1e-5)
    with torch.no_grad():
        logits, dense_logits = (each(run.input_ids("selection")).logits for each in (exported, original))
    divergences = kl_per_token(logits[:, :-1], dense_logits[:, :-1]).mean(dim=1)
    assert lane.divergences == pytest.approx(divergences.tolist(), rel=1e-4)
