"""Peak memory by depth: random models of LLaMA-7B width with 4 and 16 layers, in bfloat16, read from disk.

    .venv/bin/python tests/benchmarks/memory_by_depth.py --folder /tmp/memory_by_depth [--recover --hidden-size 2048]

Needs 9 GB of disk and about 15 minutes. For each depth, a separate process runs import, capture, branch and export, first on
a tiny model that loads all code. With ``--recover``, the models have 2 and 8 layers, lanes are refitted, and one plan is
recovered before the export; a layer of 7B width then takes three to four minutes, one of half the width 25 seconds. The peak is the
largest memory of the process minus its memory before the large model. Exits with 1 if the peaks differ by more than 10 %, or
exceed three layers plus the hidden states and, with ``--recover``, what ``plan`` adds for it: the memory of the recovery, one
byte per weight for the order of removal, embeddings and head.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from layerwise.allocators.atp import arithmetic
from layerwise.flows.settings import Search
from layerwise.recovery.layer_recovery import recovery_bytes
from layerwise.recovery.refit import Refit
from layerwise.storage.artifact import Artifact
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import write_tensors
from layerwise.tasks.branch import branch
from layerwise.tasks.capture import CaptureSettings, capture
from layerwise.tasks.export import export
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.lanes.lane_group import LaneInputs
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import layer_sizes_of, linears_by_layer
from layerwise.tasks.recovery.recover import recover
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.texts.token_windows import TOKENS_FILE

WINDOWS, SEQLEN = 2, 256
BETAS = (0.0, 0.005)
DEPTHS, RECOVERED_DEPTHS = (4, 16), (2, 8)
HIDDEN_SIZE, INTERMEDIATE_SIZE, HEADS = 4096, 11008, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--recover", action="store_true", help="recover lanes and the exported plan")
    parser.add_argument("--hidden-size", type=int, default=HIDDEN_SIZE, help="the width; other sizes follow")
    parser.add_argument("--depth", type=int, help="measure one depth in this process")
    arguments = parser.parse_args()
    if arguments.depth:
        write_model(
            arguments.folder / f"model-{arguments.depth}", arguments.depth, **sizes_of(arguments.hidden_size)
        )
        sys.stdout.write(json.dumps(measure(arguments.folder, arguments.depth, arguments.recover)))
        return
    found, depths = {}, RECOVERED_DEPTHS if arguments.recover else DEPTHS
    for depth in depths:
        write_model(arguments.folder / f"model-{depth}", depth, **sizes_of(arguments.hidden_size))
        command = [sys.executable, __file__, "--folder", arguments.folder, "--depth", str(depth)]
        command += ["--recover"] if arguments.recover else []
        found[depth] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{depth} layers: {found[depth]}")
    first, last = (found[depth] for depth in depths)
    limit = 3 * last["layer"] + last["hidden states"] + last["recovery"]
    growth = last["peak"] / first["peak"] - 1
    print(f"growth {100 * growth:+.1f} % (at most 10 %); peak {last['peak'] / limit:.2f} of the limit")
    sys.exit(abs(growth) > 0.1 or last["peak"] > limit)


def sizes_of(hidden_size: int) -> dict[str, int]:
    """Return the sizes of a LLaMA of this width, in the proportions of LLaMA-7B."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": INTERMEDIATE_SIZE * hidden_size // HIDDEN_SIZE,
        "num_attention_heads": HEADS * hidden_size // HIDDEN_SIZE,
    }


def write_model(folder: Path, depth: int, **sizes: Any) -> None:
    """Write a random LLaMA, of 7B width by default. All layers have the same values, which do not matter here."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        num_hidden_layers=depth, dtype="bfloat16", architectures=["LlamaForCausalLM"], **sizes
    )
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    layer = {
        f"{name}.weight": torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shapes.items()
    }
    layer |= {f"{name}.weight": torch.ones(width, dtype=torch.bfloat16) for name in NORMS}
    outer = {
        "model.embed_tokens.weight": torch.randn(config.vocab_size, width, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
        "lm_head.weight": torch.randn(config.vocab_size, width, dtype=torch.bfloat16) * 0.02,
    }
    groups = [outer, *({f"model.layers.{n}.{name}": t for name, t in layer.items()} for n in range(depth))]
    place: dict[str, str] = {}
    for number, tensors in enumerate(groups):
        save_file(tensors, folder / f"model-{number:05d}.safetensors")
        place |= dict.fromkeys(tensors, f"model-{number:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    (folder / "config.json").write_text(config.to_json_string())


NORMS = ("input_layernorm", "post_attention_layernorm")


def measure(folder: Path, depth: int, recover: bool) -> dict[str, int]:
    """Return sizes in bytes: peak above the start, weights of a layer, all hidden states, memory of the recovery."""
    write_model(folder / "model-small", 2, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    # Loads all code.
    recovery = Refit(steps=1) if recover else None  # the number of steps does not matter for the memory
    run_stages(ArtifactStore(str(folder / f"store-small-{depth}")), str(folder / "model-small"), recovery)
    before = memory("VmRSS")
    store = ArtifactStore(str(folder / f"store-{depth}"))
    checkpoint = run_stages(store, str(folder / f"model-{depth}"), recovery)
    window = SEQLEN * checkpoint.config.hidden_size * 2
    linears = linears_by_layer(checkpoint.index, SEQLEN)[0]
    order = sum(linear.numel for linear in linears)
    return {
        "peak": memory("VmHWM") - before,
        "layer": checkpoint.index.layer_bytes[0],
        "hidden states": window * WINDOWS * (len(BETAS) + 1) * (1 if recovery is None else 2),
        "recovery": 0
        if recovery is None
        else recovery_bytes(recovery, linears, 2) + order + checkpoint.index.outer_bytes,
    }


def run_stages(store: ArtifactStore, model: str, recovery: Refit | None) -> Checkpoint:
    """Run import, capture, branch and export; with recovery, recover a plan before its export."""
    checkpoint = import_checkpoint(store, model)
    linears = linears_by_layer(checkpoint.index, SEQLEN)
    calibration, selection = (
        tokens(store, role, checkpoint.config.vocab_size) for role in ("calibration", "selection")
    )
    execution = Execution()
    settings = Search(model="-", sparsity=0.5, recover=recovery).pruning("bfloat16")
    captured = capture.fn(store, checkpoint, calibration, selection, CaptureSettings("bfloat16"), execution)
    plans = [arithmetic(0.5, beta, layer_sizes_of(linears)) for beta in BETAS]
    inputs = LaneInputs(checkpoint, captured, calibration, selection)
    scores = branch.fn(store, inputs, plans, linears, settings, execution)
    if recovery is not None:
        recover.fn(store, inputs, [scores[1].plan], linears, settings, execution)
    lanes = scores[1], scores[0]
    export.fn(store, inputs, *lanes, linears, settings.one_shot, execution)
    return checkpoint


def tokens(store: ArtifactStore, role: str, vocabulary: int) -> Artifact:
    """Build random windows in the format of sample_tokens."""
    windows = torch.randint(vocabulary, (WINDOWS, SEQLEN), generator=torch.Generator().manual_seed(len(role)))
    return store.get_or_build(
        Stage("random_tokens", 1, role),
        lambda draft: write_tensors(draft, TOKENS_FILE, {"input_ids": windows}),
    )


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has {field}"
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
