"""Sparse kernel compared with torch and with a dense kernel that reads the matrix once, for one token and 7B shapes.

    .venv/bin/python tests/benchmarks/sparse_kernel.py

Takes two minutes and 2.5 GB. The candidates run in turns with torch's threads, each on several matrices that together
exceed all caches. The dense kernel has its matrices in huge pages, like packed ones; torch is measured with and without
huge pages. On a machine without AVX-512 and bfloat16 instructions, the AVX2 level of the kernel is measured, with the
limits for AVX2. Exits with 1 if a ratio is below its limit.
"""

import argparse
import ctypes
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from layerwise.sparse.bitmask import pack
from layerwise.sparse.build import compile_kernel
from layerwise.sparse.huge_pages import in_huge_pages
from layerwise.sparse.native import LEVELS, Kernel, kernel
from layerwise.sparse.panel_weight import panels_of
from layerwise.sparse.timing import in_turns, seconds_of, stream_bandwidth

TORCH, DENSE = "torch bfloat16", "dense kernel"  # the baselines
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
SPARSITIES = (0.5, 0.7)
TOTAL_BYTES = 400 << 20  # total size of the dense matrices of a shape
# Lowest speed relative to torch in bfloat16: by shape at 70 %, for all shapes at 50 %, and for the AVX2 level. The last
# number is relative to the dense kernel.
AT_70 = dict(zip(SHAPES, (4.0, 4.5, 4.0), strict=True))
AT_50, OF_AVX2, TO_DENSE = 3.0, 2.0, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    native = kernel()
    if native is None:
        sys.exit("the sparse kernel was not built. Build it with: python -m layerwise.sparse.build")
    with tempfile.TemporaryDirectory() as folder:
        compile_kernel(Path(folder, "dense.so"), ("-O3",), [Path(__file__).with_name("dense_kernel.cpp")])
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
    print("\n".join(missed) or "all limits are met")
    sys.exit(bool(missed))


@dataclass(frozen=True)
class Candidate:
    """A multiplication, and the matrices to multiply."""

    multiply: Callable[[Any], object]
    weights: Sequence[Any]

    def seconds(self) -> float:
        """Return the time per matrix."""
        return seconds_of(lambda: [self.multiply(weight) for weight in self.weights]) / len(self.weights)


def measure(
    shape: tuple[int, int], sparsity: float, native: Kernel, dense: Callable[..., object], rounds: int
) -> list[str]:
    """Print a table for one shape at one sparsity; return the limits that were missed."""
    candidates = candidates_of(shape, sparsity, native, dense)
    seconds = in_turns({name: each.seconds for name, each in candidates.items()}, rounds)

    def ratio(base: str, name: str) -> float:
        """Return the median over the rounds, so that load by other processes affects both candidates."""
        return statistics.median(ours / its for ours, its in zip(seconds[base], seconds[name], strict=True))

    title = f"{shape[0]} x {shape[1]} at {100 * sparsity:.0f} %"
    print(f"\n{title}, {len(candidates[TORCH].weights)} matrices")
    print(f"{'':20}{'ms':>8}{'GB/s':>8}{f'x {TORCH}':>18}{f'x {DENSE}':>16}")
    for name, candidate in candidates.items():
        median = statistics.median(seconds[name])
        rate = candidate.weights[0].nbytes / median / 1e9
        print(f"{name:20}{1000 * median:8.3f}{rate:8.1f}{ratio(TORCH, name):18.2f}{ratio(DENSE, name):16.2f}")
    return [
        f"{title}: {name} {ratio(base, name):.2f} times {base}, not {floor}"
        for (base, name), floor in floors_of(shape, sparsity, native).items()
        if ratio(base, name) < floor
    ]


def candidates_of(
    shape: tuple[int, int], sparsity: float, native: Kernel, dense: Callable[..., object]
) -> dict[str, Candidate]:
    """Return all candidates by name, each with matrices that exceed all caches."""
    weights = [random_weight(shape, sparsity) for _ in range(-(-TOTAL_BYTES // (2 * shape[0] * shape[1])))]
    packed = [panels_of(pack(weight)) for weight in weights]
    steps = [panels_of(pack(weight), int8=True) for weight in weights]
    in_pages = [in_huge_pages(weight) for weight in weights]
    wide = [weight.float() for weight in weights[: -(-len(weights) // 2)]]
    inputs = torch.randn(1, shape[1], dtype=torch.bfloat16)
    avx2 = Kernel(native.library, "avx2")
    return {
        "torch float32": Candidate(partial(linear, inputs.float()), wide),
        TORCH: Candidate(partial(linear, inputs), weights),
        "torch in huge pages": Candidate(partial(linear, inputs), in_pages),
        DENSE: Candidate(partial(dense_product, dense, inputs), in_pages),
        "sparse": Candidate(lambda weight: native.multiply(weight, inputs), packed),
        "sparse int8": Candidate(lambda weight: native.multiply(weight, inputs), steps),
        "sparse AVX2": Candidate(lambda weight: avx2.multiply(weight, inputs), packed),
    }


def floors_of(shape: tuple[int, int], sparsity: float, native: Kernel) -> dict[tuple[str, str], float]:
    """Return the limits by baseline and candidate for the instructions of this CPU."""
    floors = {(TORCH, "sparse AVX2"): OF_AVX2} if sparsity == 0.7 else {}
    if native.level == LEVELS[-1]:
        floors[TORCH, "sparse"] = AT_70[shape] if sparsity == 0.7 else AT_50
        if sparsity == 0.7:
            floors[DENSE, "sparse"] = TO_DENSE
    return floors


def random_weight(shape: tuple[int, int], sparsity: float) -> Tensor:
    """Return random bfloat16 weights of which about ``sparsity`` are zero."""
    weight = torch.randn(shape, dtype=torch.bfloat16)
    return weight.masked_fill_(torch.rand(shape) < sparsity, 0)


def dense_product(dense: Callable[..., object], inputs: Tensor, weight: Tensor) -> Tensor:
    """Multiply with ``dense_kernel.cpp``."""
    rows, columns = weight.shape
    outputs = torch.empty(rows)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, inputs, outputs))
    dense(*pointers, ctypes.c_int64(rows), ctypes.c_int64(columns), torch.get_num_threads())
    return outputs


if __name__ == "__main__":
    main()
