"""Measurements of several ways to the same result, in turns: what else the machine does falls on all of them."""

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

STREAM_BYTES = 256 << 20  # more than the last-level cache of any CPU this is likely to run on
STREAM_ROUNDS = 9


def in_turns(ways: Mapping[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """What every way measures in every round, after a round that does not count.

    Every round begins with another way, so that none always follows the same one.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"{rounds} rounds measure nothing. Ask for one or more.")
    names = list(ways)
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    for number in range(-1, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            found = ways[name]()
            if number >= 0:
                measured[name].append(found)
    return measured


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def stream_bandwidth() -> float:
    """Bytes a second at which this process reads memory that is in no cache, with torch's threads: the median."""
    numbers = in_huge_pages(torch.ones(STREAM_BYTES // 8, dtype=torch.int64))
    seconds = in_turns({"read": lambda: seconds_of(numbers.sum)}, STREAM_ROUNDS)["read"]
    return STREAM_BYTES / statistics.median(seconds)


def cpu_name() -> str:
    """What the CPU calls itself."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", information.read_text()) if information.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
