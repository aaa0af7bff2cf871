"""The sparse kernel against torch and a dense kernel that reads the matrix once: one token, shapes of a 7B LLaMA.

    .venv/bin/python tests/benchmarks/sparse_kernel.py

Two minutes, 2 GB. Every way goes through several matrices that together are in no cache, in turns within one run, with
torch's threads. On a machine without AVX-512 and bfloat16 instructions the kernel's AVX2 level is measured, and the
floors are those of AVX2. Exits with 1 if a ratio is below its floor.
"""

import argparse
import ctypes
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from layerwise.bitmask import pack
from layerwise.sparse.build import compile_kernel
from layerwise.sparse.native import LEVELS, Kernel, kernel
from layerwise.sparse.panels import panels_of
from layerwise.sparse.timing import in_turns, stream_bandwidth

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
SPARSITIES = (0.5, 0.7)
TOTAL_BYTES = 400 << 20  # of the dense matrices of a shape
# Least ratios to torch in bfloat16, by shape at 70 %, of all shapes at 50 %, of the AVX2 level; to the dense kernel.
AT_70 = dict(zip(SHAPES, (4.0, 4.5, 4.0), strict=True))
AT_50, OF_AVX2, TO_DENSE = 3.0, 2.0, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    native = kernel()
    if native is None:
        sys.exit("the sparse kernel was not built: python -m layerwise.sparse.build")
    with tempfile.TemporaryDirectory() as folder:
        compile_kernel(Path(folder, "dense.so"), ("-O3",), Path(__file__).with_name("dense_kernel.cpp"))
        dense = ctypes.CDLL(str(Path(folder, "dense.so"))).dense_multiply
    print(
        f"{torch.get_num_threads()} threads, level {native.level}, reading {stream_bandwidth() / 1e9:.1f} GB/s"
    )
    missed = [
        miss
        for sparsity in SPARSITIES
        for shape in SHAPES
        for miss in measure(shape, sparsity, native, dense, rounds)
    ]
    print("\n".join(missed) or "every floor is reached")
    sys.exit(bool(missed))


def measure(
    shape: tuple[int, int], sparsity: float, native: Kernel, dense: Callable[..., object], rounds: int
) -> list[str]:
    """Print a table of one shape at one sparsity; returns the floors that were missed."""
    count = -(-TOTAL_BYTES // (2 * shape[0] * shape[1]))
    weights = [random_weight(shape, sparsity) for _ in range(count)]
    packed = [panels_of(pack(weight)) for weight in weights]
    steps = [panels_of(pack(weight), int8=True) for weight in weights]
    wide = [weight.float() for weight in weights[: -(-count // 2)]]
    inputs = torch.randn(1, shape[1], dtype=torch.bfloat16)
    avx2 = Kernel(native.library, "avx2")
    calls = {
        "torch float32": partial(each, wide, partial(linear, inputs.float())),
        "torch bfloat16": partial(each, weights, partial(linear, inputs)),
        "dense kernel": partial(each, weights, partial(dense_product, dense, inputs)),
        "sparse": partial(each, packed, lambda weight: native.multiply(weight, inputs)),
        "sparse int8": partial(each, steps, lambda weight: native.multiply(weight, inputs)),
        "sparse AVX2": partial(each, packed, lambda weight: avx2.multiply(weight, inputs)),
    }
    bytes_of = {
        "torch float32": wide[0].nbytes,
        "torch bfloat16": weights[0].nbytes,
        "dense kernel": weights[0].nbytes,
        "sparse": packed[0].nbytes,
        "sparse int8": steps[0].nbytes,
        "sparse AVX2": packed[0].nbytes,
    }
    seconds = in_turns(calls, rounds)
    sizes = {name: len(wide) if name == "torch float32" else count for name in calls}
    medians = {name: statistics.median(times) / sizes[name] for name, times in seconds.items()}
    # Ratios round by round: what another process takes from one round it takes from both.
    ratios = {
        base: {
            name: statistics.median(
                [
                    (ours / sizes[base]) / (its / sizes[name])
                    for ours, its in zip(seconds[base], seconds[name], strict=True)
                ]
            )
            for name in calls
        }
        for base in ("torch bfloat16", "dense kernel")
    }
    print(f"\n{shape[0]} x {shape[1]} at {100 * sparsity:.0f} %, {count} matrices")
    print(f"{'':15}{'ms':>8}{'GB/s':>8}{'x torch bfloat16':>18}{'x dense kernel':>16}")
    for name, median in medians.items():
        print(
            f"{name:15}{1000 * median:8.3f}{bytes_of[name] / median / 1e9:8.1f}"
            f"{ratios['torch bfloat16'][name]:18.2f}{ratios['dense kernel'][name]:16.2f}"
        )
    fast = native.level == LEVELS[-1]
    floors = {("torch bfloat16", "sparse AVX2"): OF_AVX2} if sparsity == 0.7 else {}
    if fast:
        floors[("torch bfloat16", "sparse")] = AT_70[shape] if sparsity == 0.7 else AT_50
        if sparsity == 0.7:
            floors[("dense kernel", "sparse")] = TO_DENSE
    return [
        f"{shape[0]} x {shape[1]} at {100 * sparsity:.0f} %: {name} {ratios[base][name]:.2f} times {base}, not {floor}"
        for (base, name), floor in floors.items()
        if ratios[base][name] < floor
    ]


def random_weight(shape: tuple[int, int], sparsity: float) -> Tensor:
    """Random numbers in bfloat16, a random share of them zero."""
    weight = torch.randn(shape, dtype=torch.bfloat16)
    return weight.masked_fill_(torch.rand(shape) < sparsity, 0)


def each(weights: list, multiply: Callable[[object], object]) -> None:
    for weight in weights:
        multiply(weight)


def dense_product(dense: Callable[..., object], inputs: Tensor, weight: Tensor) -> Tensor:
    """By ``dense_kernel.cpp``."""
    rows, columns = weight.shape
    outputs = torch.empty(rows)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, inputs, outputs))
    dense(*pointers, ctypes.c_int64(rows), ctypes.c_int64(columns), torch.get_num_threads())
    return outputs


if __name__ == "__main__":
    main()
