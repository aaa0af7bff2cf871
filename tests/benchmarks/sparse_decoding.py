"""Text generation with packed weights: a transformers LLaMA with 7B shapes and random weights, pruned to 70 %.

    .venv/bin/python tests/benchmarks/sparse_decoding.py [--layers 16]

Takes five minutes and 13 GB with 16 layers. Sparsity rises from layer to layer by an ATP plan. Exits with 1 if the
packed model is less than 3.5 times as fast as torch in bfloat16 (1.5 times on a CPU without bfloat16 instructions), or
if its pruned linears need more than .37 of their dense size.
"""

import argparse
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerwise.allocators.atp import arithmetic
from layerwise.flows.cli.console import open_console
from layerwise.flows.cli.tables import show_speed
from layerwise.models.skeleton import linears_of
from layerwise.sparse.engines import BFLOAT16, SPARSE
from layerwise.sparse.native import LEVELS
from layerwise.sparse.speed import measure_speed
from layerwise.sparse.speed_settings import SpeedSettings

SPARSITY, LOWEST = 0.7, 0.55  # overall sparsity, and sparsity of the first layer
FASTER = {"avx512_bf16": 3.5}
LEAST_FASTER, MOST_BYTES = 1.5, 0.37


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    layers = parser.parse_args().layers
    table = measure_speed(pruned_llama(layers), SpeedSettings(prompt_tokens=16, new_tokens=32, rounds=3))
    show_speed(open_console(), table, None)
    speeds = {each.way: each for each in table.speeds}
    if SPARSE not in speeds:
        sys.exit(f"nothing to measure: {table.left_out[SPARSE]}")
    config = LlamaConfig()
    head = 2 * config.vocab_size * config.hidden_size
    share = (speeds[SPARSE].weight_bytes - head) / (speeds[BFLOAT16].weight_bytes - head)
    floor = FASTER.get(table.level or LEVELS[0], LEAST_FASTER)
    print(f"pruned linears: {share:.3f} of their dense size (at most {MOST_BYTES})")
    faster = speeds[SPARSE].to_bfloat16
    assert faster is not None, "torch in bfloat16 was measured"
    print(f"{faster:.2f} times torch bfloat16 (at least {floor})")
    sys.exit(share > MOST_BYTES or faster < floor)


def pruned_llama(layers: int) -> LlamaForCausalLM:
    """Build a model with random bfloat16 weights, the same for all layers, pruned to the sparsities of the plan."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers)).bfloat16()
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    model.model.rotary_emb.__init__(model.config)  # its frequencies are buffers
    sizes = [
        sum(linear.numel for linear in linears_of(layer))
        for layer in (model.model.layers[index] for index in range(layers))
    ]
    plan = arithmetic(SPARSITY, 2 * (SPARSITY - LOWEST) / (layers - 1), sizes)
    torch.manual_seed(0)
    drawn: dict[torch.Size, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1)
            continue
        if parameter.shape not in drawn:
            drawn[parameter.shape] = 0.02 * torch.randn(parameter.shape, dtype=torch.bfloat16)
        parameter.copy_(drawn[parameter.shape])
        if ".layers." in name:
            sparsity = plan.layers[int(name.split(".")[2])]
            assert isinstance(sparsity, float), "a plan by ATP has one sparsity for each layer"
            parameter.masked_fill_(torch.rand(parameter.shape) < sparsity, 0)
    return model


if __name__ == "__main__":
    main()
