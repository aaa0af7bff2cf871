"""Timing of several calls in turns, so that other load on the machine affects all of them."""

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from layerwise.sparse.huge_pages import in_huge_pages

Measured = TypeVar("Measured")

STREAM_BYTES = 256 << 20  # larger than the last-level cache of likely CPUs
STREAM_ROUNDS = 9


def in_turns(calls: Mapping[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """Run every call once per round, after a warm-up round.

    Every round starts with another call, so that the order of the calls varies.

    Returns:
        Results of every call by name, one per round.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be 1 or more.")
    names = list(calls)
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    for number in range(-1, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            found = calls[name]()
            if number >= 0:
                measured[name].append(found)
    return measured


def seconds_of(call: Callable[[], object]) -> float:
    """Return the duration of a call in seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def stream_bandwidth() -> float:
    """Return the median rate, in bytes per second, at which torch's threads read uncached memory."""
    numbers = in_huge_pages(torch.ones(STREAM_BYTES // 8, dtype=torch.int64))
    seconds = in_turns({"read": lambda: seconds_of(numbers.sum)}, STREAM_ROUNDS)["read"]
    return STREAM_BYTES / statistics.median(seconds)


def cpu_name() -> str:
    """Return the model name of the CPU."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", information.read_text()) if information.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
