"""A checkpoint with the shapes of LLaMA-2-70B (80 layers, 138 GB) through plan, import, capture, lanes, export and test.

    .venv/bin/python tests/benchmarks/seventy_billion.py --folder /mnt/xfs/seventy --store /tmp/seventy

All layers have the same random weights, so on a file system with reflinks (XFS, btrfs) the checkpoint takes 4 GB of disk;
elsewhere 138 GB. The windows are few and short: what is measured is the work that depends on the weights. Every linear of
every layer is ranked, for two lanes, two tested models and the export. Blocks of finished shards of the export are given
back to the disk, because nothing reads them again. Every stage runs in a process of its own, on one thread.

Prints for each stage: CPU seconds, wall time, peak memory above the start, and bytes read; then what the plan stated. Exits
with 1 if a peak is above the plan's memory, or if the weights are read more than four times. Needs 25 minutes.
"""

import argparse
import fcntl
import json
import os
import random
import re
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.benchmarks.memory_by_depth import memory

if TYPE_CHECKING:
    from layerwise.flows.settings import Search

FICLONE = 0x40049409  # ioctl of Linux: let a file share the blocks of another
PUNCH_HOLE, KEEP_SIZE = 2, 1  # flags of fallocate
HEADER = 16384  # bytes of a shard's header: a multiple of the block size
STAGES = ("import_checkpoint", "capture", "branch", "export")
SEQLEN = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="for the checkpoint; with reflinks if possible"
    )
    parser.add_argument("--store", type=Path, required=True, help="a new folder on a disk with 5 GB")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--pruner", default="wanda")
    parser.add_argument("--stage", choices=STAGES, help="run up to this stage in this process")
    arguments = parser.parse_args()
    if arguments.stage:
        sys.stdout.write(json.dumps(run_stage(arguments)))
        return
    write_checkpoint(arguments.folder, arguments.layers)
    planned = plan(arguments)
    print(f"plan: {planned['memory'] / 1e9:.2f} GB of memory: {planned['parts']}", flush=True)
    finished = threading.Event()
    threading.Thread(target=free_exported, args=(arguments.store, finished), daemon=True).start()
    found = {}
    for stage in STAGES:
        options = ["--folder", arguments.folder, "--store", arguments.store, "--pruner", arguments.pruner]
        command = [sys.executable, __file__, *options, "--stage", stage]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        ).stdout
        found[stage] = row = json.loads(output.splitlines()[-1])
        print(
            f"{stage}: {row['cpu']:.0f} CPU s, {row['wall']:.0f} s, peak {row['peak'] / 1e9:.2f} GB, "
            f"{row['read'] / 1e9:.1f} GB of weights read",
            flush=True,
        )
    finished.set()
    size = planned["weights"]
    passes = sum(row["read"] for row in found.values()) / size
    peak = max(row["peak"] for row in found.values())
    print(
        f"{passes:.2f} passes over {size / 1e9:.1f} GB; peak {peak / planned['memory']:.2f} of the plan's memory"
    )
    sys.exit(passes > 4.1 or peak > planned["memory"])


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write the checkpoint, a tokenizer and a text, unless they exist."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    width, inner, narrow = 8192, 28672, 1024
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    outer = {"model.embed_tokens": (32000, width), "lm_head": (32000, width), "model.norm": (width,)}
    write_shard(folder / "model-outer.safetensors", outer)
    place = {f"{name}.weight": "model-outer.safetensors" for name in outer}
    template = folder / "model-layer-00.safetensors"
    for layer in range(layers):
        shard = folder / f"model-layer-{layer:02d}.safetensors"
        named = {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
        if layer == 0:
            write_shard(shard, named)
        else:
            clone(template, shard)
            with shard.open("r+b") as file:
                file.write(header(named))
        place |= {f"{name}.weight": shard.name for name in named}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    words = {"<unk>": 0} | {f"w{number}": number for number in range(1, 1000)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (folder.parent / "seventy.txt").write_text(" ".join(random.Random(0).choices(list(words)[1:], k=2000)))
    (folder / "config.json").write_text(config.to_json_string())


def header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Return the header of a shard, of a fixed size, so that shards of all layers can share their data."""
    entries, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + 2 * torch.Size(shape).numel()
        entries[f"{name}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(entries).encode().ljust(HEADER - 8)
    assert len(content) == HEADER - 8
    return struct.pack("<Q", len(content)) + content


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write random weights; norms are 1."""
    with path.open("wb") as file:
        file.write(header(shapes))
        for shape in shapes.values():
            weight = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)
            file.write(weight.bfloat16().view(torch.uint8).numpy().data)


def clone(source: Path, target: Path) -> None:
    """Copy a file, sharing its blocks if the file system can."""
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
        except OSError:
            os.sendfile(new.fileno(), old.fileno(), 0, source.stat().st_size)


def free_exported(store: Path, finished: threading.Event) -> None:
    """Give the blocks of finished shards of the export back to the disk. They keep their size."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    freed: set[Path] = set()
    while not finished.wait(1):
        for shard in set((store / "export").glob("*/*/model-*.safetensors")) - freed:
            with shard.open("r+b") as file:
                if libc.fallocate(file.fileno(), PUNCH_HOLE | KEEP_SIZE, 0, shard.stat().st_size) == 0:
                    freed.add(shard)


def search_settings(arguments: argparse.Namespace) -> "Search":
    """Return the settings of the search."""
    from layerwise.flows.settings import Search

    text = str(arguments.folder.parent / "seventy.txt")
    return Search(
        model=str(arguments.folder),
        sparsity=0.7,
        betas=(0.004,),
        pruner=arguments.pruner,
        calibration=text,
        selection=text,
        calibration_windows=2,
        selection_windows=2,
        test_windows=2,
        seqlen=SEQLEN,
    )


def plan(arguments: argparse.Namespace) -> dict:
    """Return what ``layerwise plan`` says about the search."""
    from layerwise.flows.plan import plan_search
    from layerwise.flows.runtime import SearchRuntime
    from layerwise.tasks.import_checkpoint import inspect_source

    found = plan_search(search_settings(arguments), SearchRuntime(store=str(arguments.store)))
    parts = {name: f"{number / 1e9:.2f}" for name, number in found.memory.items()}
    index = inspect_source(str(arguments.folder))
    weights = sum(tensor.entry.nbytes for tensor in index.tensors)
    return {"memory": sum(found.memory.values()), "parts": parts, "weights": weights}


def run_stage(arguments: argparse.Namespace) -> dict[str, float]:
    """Run the search up to a stage; earlier ones are in the store. Returns what this process used for it."""
    from prefect import flow

    from layerwise.flows.orchestration.embedded_server import ServerStart
    from layerwise.flows.pipeline.graph import search_steps
    from layerwise.flows.pipeline.inputs import check_inputs
    from layerwise.flows.runtime import SearchRuntime

    settings = search_settings(arguments)
    runtime = SearchRuntime(store=str(arguments.store))
    store = runtime.open_store()

    @flow(name="seventy_billion")
    def run() -> dict[str, float]:
        execution = runtime.execution()
        steps = search_steps(store, settings, check_inputs(store, settings))
        step = next(steps)
        while step.name != arguments.stage:
            step = steps.send(step.build(execution))
        before, cpu, wall = memory("VmRSS"), time.process_time(), time.monotonic()
        already = bytes_read()
        step.build(execution)
        return {
            "cpu": time.process_time() - cpu,
            "wall": time.monotonic() - wall,
            "peak": memory("VmHWM") - before,
            "read": bytes_read() - already,
        }

    ServerStart().wait()
    return run()


def bytes_read() -> int:
    """Return the bytes that this process has read from files."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found, "/proc/self/io has rchar"
    return int(found[1])


if __name__ == "__main__":
    main()
