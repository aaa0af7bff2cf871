"""CPU time of ranking by selection, relative to the stable sort that was used before.

    .venv/bin/python tests/benchmarks/ranking.py

Takes a minute and 1.5 GB. Ranks a bfloat16 weight with Wanda at the widths of a 70B model, and a whole matrix with
magnitude. The candidates run in turns and must find the same levels. All times are CPU seconds of all threads, so that
other work on the machine matters little. "Ranked" is from the weight to the levels; "with masks" adds the zeroing of
the weight in every lane. The best of the rounds counts. Exits with 1 if the kernel is below its limits, or selection
without the kernel below its own.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from layerwise.calibration.statistics import InputStatistics
from layerwise.models.skeleton import Linear
from layerwise.pruners.layer_pruning import GradualZeroing
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.wanda import Wanda
from layerwise.sparse.native import kernel

SORT, KERNEL, TORCH = "stable sort", "kernel", "without kernel"
ENTRIES = 1 << 23  # of the ranked matrix
COUNTS = (1, 9)
# Lowest ratio of the CPU times of the sort and a candidate, for ranking alone.
LIMITS = {KERNEL: 8.0, TORCH: 3.0}
LIMIT_WITH_MASKS = 8.0  # for the kernel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if kernel() is None:
        sys.exit("the kernel was not built. Build it with: python -m layerwise.sparse.build")
    print(f"{torch.get_num_threads()} threads; CPU time in ns per weight; in brackets: times the stable sort")
    print(f"{'':26}{'counts':>7}{SORT:>14}{KERNEL:>18}{TORCH:>18}{'sort, masks':>14}{'kernel, masks':>18}")
    cases = [
        Case("Wanda, 8192 inputs", 8192, Wanda()),
        Case("Wanda, 28672 inputs", 28672, Wanda()),
        Case("magnitude, whole matrix", 8192, Magnitude()),
    ]
    missed = [miss for case in cases for number in COUNTS for miss in case.measure(number, rounds)]
    print("\n".join(missed) or "all limits are met")
    sys.exit(bool(missed))


@dataclass(frozen=True)
class Case:
    """A matrix to rank."""

    title: str
    in_features: int
    pruner: Wanda | Magnitude

    def measure(self, number: int, rounds: int) -> list[str]:
        """Print one line; return the limits that were missed."""
        generator = torch.Generator().manual_seed(number)
        rows = ENTRIES // self.in_features
        weight = (torch.randn(rows, self.in_features, generator=generator) * 0.02).bfloat16()
        inputs = InputStatistics.empty(self.in_features)
        inputs.add(torch.rand(self.in_features, generator=generator) + 0.01, tokens=1)
        counts = [round(weight.numel() * (0.5 + 0.04 * index)) for index in range(number)]

        def select() -> Tensor:
            return self.pruner.removal_levels(weight, inputs, counts)

        def select_without_kernel() -> Tensor:
            with patch("layerwise.pruners.row_levels.kernel", lambda: None):
                return select()

        def sort() -> Tensor:
            with patch("layerwise.pruners.masks.levels_of_rows", sorted_levels):
                return select()

        ways = {SORT: sort, KERNEL: select, TORCH: select_without_kernel}
        linear = Linear("linear", rows, self.in_features, transposed=False)
        times: dict[str, list[float]] = {name: [] for name in (*ways, "sort, masks", "kernel, masks")}
        for _ in range(rounds):
            found = {}
            for name, way in ways.items():
                found[name] = cpu_time(way, times[name])
            assert all(torch.equal(levels, found[SORT]) for levels in found.values()), "the levels differ"
            pruned, other = weight.clone(), weight.clone()
            cpu_time(partial(zero_one_by_one, pruned, found[SORT], number), times["sort, masks"])
            zeroing = GradualZeroing(linear, other, found[SORT], range(number))
            cpu_time(partial(visit_all, zeroing, number), times["kernel, masks"])
            assert torch.equal(other, pruned), "the pruned weights differ"
        best = {name: min(measured) / weight.numel() * 1e9 for name, measured in times.items()}
        best["sort, masks"] += best[SORT]
        best["kernel, masks"] += best[KERNEL]
        ratios = {name: best[SORT] / best[name] for name in (KERNEL, TORCH)}
        ratios["kernel, masks"] = best["sort, masks"] / best["kernel, masks"]
        columns = "".join(f"{best[name]:11.2f} ({ratios[name]:.1f})" for name in (KERNEL, TORCH))
        print(
            f"{self.title:26}{number:7}{best[SORT]:14.1f}{columns}{best['sort, masks']:14.1f}"
            f"{best['kernel, masks']:11.2f} ({ratios['kernel, masks']:.1f})"
        )
        limits = LIMITS | {"kernel, masks": LIMIT_WITH_MASKS}
        return [
            f"{self.title}, {number} counts: {name} {ratios[name]:.2f} times as fast as the sort, not {limit}"
            for name, limit in limits.items()
            if ratios[name] < limit
        ]


def cpu_time(action: Callable[[], Any], times: list[float]) -> Any:
    """Append the CPU seconds of ``action`` to ``times``; return its result."""
    began = time.process_time()
    result = action()
    times.append(time.process_time() - began)
    return result


def sorted_levels(scores: Tensor, per_row: Sequence[int], extra: Sequence[int]) -> Tensor:
    """Return the levels as layerwise did before it selected: by a stable sort of every row."""
    order = scores.argsort(dim=1, stable=True)
    by_rank = torch.zeros(scores.shape, dtype=torch.uint8)
    for count, more in zip(per_row, extra, strict=True):
        by_rank[:more, count + 1 :] += 1
        by_rank[more:, count:] += 1
    return torch.empty_like(by_rank).scatter_(1, order, by_rank)


def visit_all(zeroing: GradualZeroing, lanes: int) -> None:
    for lane in range(lanes):
        zeroing.visit(lane)


def zero_one_by_one(weight: Tensor, levels: Tensor, number: int) -> None:
    """Zero the weight in every lane as layerwise did before: by the mask of each level."""
    for level in range(number):
        weight.masked_fill_(levels == level, 0)


if __name__ == "__main__":
    main()
