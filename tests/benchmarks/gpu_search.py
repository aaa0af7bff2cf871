"""Lanes of a search on a GPU: random LLaMAs with 8 layers of 7B width and with 2 layers of 70B width, in bfloat16.

    .venv/bin/python tests/benchmarks/gpu_search.py --folder /tmp/gpu_search

Needs torch with CUDA, 12 GB of disk and about ten minutes. Import, capture and the lanes run as in a search (Wanda at 70 %,
uniform and four betas). The capture is the warm-up; the lanes are profiled. For each width: seconds per layer, the time of
the GPU by kind of work, the share of time in which it is idle, TFLOP/s of the matrix products, GB/s of the copies to the
device, its peak memory. Before that, a small model is searched in float32 on the CPU and on the device: the losses
must agree to 1e-3. Exits with 1 if they do not.

``--device sim:0 --small --windows 4 --seqlen 128`` tries the script on a simulated device, on a machine without a GPU: it
prints what crosses to the device and back, how often the CPU waits, and the peak memory.
"""

import argparse
import shutil
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from layerwise.allocators.atp import arithmetic
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import write_tensors
from layerwise.tasks.branch import branch
from layerwise.tasks.capture import CaptureSettings, capture
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.lanes.lane_group import LaneInputs
from layerwise.tasks.models.streamed import layer_sizes_of, linears_by_layer
from layerwise.tasks.results.lane_scores import LaneScore
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.texts.token_windows import TOKENS_FILE
from tests.benchmarks.memory_by_depth import write_model
from tests.simulated_device import Traffic, simulated_device

BETAS = (0.0, 0.002, 0.004, 0.006, 0.008)
SPARSITY = 0.7
SEVENTY = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,  # attention's linears are square in the random model
}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 512}
KINDS = {  # parts of the names of kernels
    "copies to the device": ("HtoD",),
    "copies to the host": ("DtoH",),
    "matrix products": ("gemm", "cutlass", "xmma", "nvjet"),
    "attention": ("flash", "fmha", "attention"),
    "ranking": ("sort", "Sort", "radix"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--windows", type=int, default=16, help="of each of calibration and selection")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--small", action="store_true", help="narrow models, to try the script")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    if arguments.device.startswith("cuda"):
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    widths = {"7B": (8, {}), "70B": (2, SEVENTY)}
    if arguments.small:
        widths = {"small": (3, SMALL)}
    is_simulated = arguments.device.startswith("sim")
    with simulated_device() if is_simulated else nullcontext() as traffic:
        agree = equality(arguments)
        for name, (layers, sizes) in widths.items():
            measure(arguments, name, layers, sizes, traffic)
    sys.exit(not agree)


def equality(arguments: argparse.Namespace) -> bool:
    """Compare the losses of the lanes in float32 on the CPU and on the device."""
    model = arguments.folder / "model-equality"
    write_model(model, 3, **SMALL)
    losses = []
    for device in ("cpu", arguments.device):
        run = Run(arguments.folder / "store-equality", model, "float32", Execution(device), 4, 128)
        losses.append([score.losses for score in run.branch(run.capture())])
    difference = max(
        abs(a - b) for one, other in zip(*losses, strict=True) for a, b in zip(one, other, strict=True)
    )
    print(f"float32, losses on the CPU and on the device differ by at most {difference:.1e}", flush=True)
    return difference < 1e-3


def measure(
    arguments: argparse.Namespace, name: str, layers: int, sizes: dict[str, int], traffic: Traffic | None
) -> None:
    """Print the figures of one width.

    Args:
        traffic: counters of the simulated device; None for a real one.
    """
    model = arguments.folder / f"model-{name}"
    write_model(model, layers, **sizes)
    on_cuda = arguments.device.startswith("cuda")
    execution = Execution(arguments.device)
    run = Run(
        arguments.folder / f"store-{name}", model, "bfloat16", execution, arguments.windows, arguments.seqlen
    )
    captured = run.capture()
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    if traffic is not None:
        traffic.restart()
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) if on_cuda else nullcontext(None) as profiled:
        run.branch(captured)
        if on_cuda:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    print(
        f"{name} width, {layers} layers, {len(BETAS)} lanes of {arguments.windows} windows of {arguments.seqlen}:"
    )
    print(f"  {seconds / layers:.2f} s per layer, {seconds:.1f} s in all")
    if traffic is not None:
        layer, waits = run.checkpoint.index.layer_bytes[0], traffic.waits / layers
        print(
            f"  to the device {traffic.to_device / layer / layers:.2f} times the weights, {waits:.0f} waits per layer"
        )
        print(
            f"  to the host {traffic.to_host / 1e6:.3f} MB, peak memory {traffic.peak / layer:.1f} times a layer"
        )
    if profiled is None:
        return
    by_kind, busy = Counter[str](), []
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = next(
                (kind for kind, parts in KINDS.items() if any(p in event.name for p in parts)), "other"
            )
            by_kind[kind] += event.time_range.elapsed_us() / 1e6
            busy.append((event.time_range.start, event.time_range.end))
    for kind, total in by_kind.most_common():
        print(f"  {kind}: {total / layers:.3f} s per layer")
    weights = sum(layer_sizes_of(run.linears))
    tokens = len(BETAS) * arguments.windows * arguments.seqlen
    print(f"  idle: {100 * (1 - covered(busy) / 1e6 / seconds):.0f} %")
    print(f"  matrix products: {2 * weights * tokens / by_kind['matrix products'] / 1e12:.0f} TFLOP/s")
    print(f"  copies to the device: {2 * weights / by_kind['copies to the device'] / 1e9:.1f} GB/s")
    print(f"  peak memory of the device: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)


def covered(ranges: list[tuple[float, float]]) -> float:
    """Return the total length of the union of ranges."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Run:
    """The stages of a search up to the lanes, in a store that is deleted first."""

    def __init__(
        self, store: Path, model: Path, dtype: str, execution: Execution, windows: int, seqlen: int
    ) -> None:
        shutil.rmtree(store, ignore_errors=True)
        self.store = ArtifactStore(str(store))
        self.checkpoint = import_checkpoint(self.store, str(model))
        self.linears = linears_by_layer(self.checkpoint.index, seqlen)
        self.dtype, self.execution = dtype, execution
        self.calibration, self.selection = (self._tokens(seed, windows, seqlen) for seed in (1, 2))

    def _tokens(self, seed: int, windows: int, seqlen: int) -> Artifact:
        vocabulary = self.checkpoint.config.vocab_size
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(vocabulary, (windows, seqlen), generator=generator)
        return self.store.get_or_build(
            Stage("random_tokens", 1, seed),
            lambda draft: write_tensors(draft, TOKENS_FILE, {"input_ids": input_ids}),
        )

    def capture(self) -> Artifact:
        """Run the dense model."""
        settings = CaptureSettings(self.dtype)
        return capture.fn(
            self.store, self.checkpoint, self.calibration, self.selection, settings, self.execution
        )

    def branch(self, captured: Artifact) -> list[LaneScore]:
        """Run the lanes, and return their scores."""
        plans = [arithmetic(SPARSITY, beta, layer_sizes_of(self.linears)) for beta in BETAS]
        inputs = LaneInputs(self.checkpoint, captured, self.calibration, self.selection)
        settings = Search(model="-", sparsity=SPARSITY).pruning(self.dtype)
        return branch.fn(self.store, inputs, plans, self.linears, settings, self.execution)


if __name__ == "__main__":
    main()
