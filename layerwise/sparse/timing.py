"""How long things take on this machine, told apart from what other programs take of it."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

STREAM_BYTES = 1 << 29  # several times any cache
STREAM_READS = 5
# A sample is disturbed if this share of its time our threads wanted a core and had none.
DISTURBED = 0.02
LEAST_SAMPLES = 3  # that are undisturbed; with fewer, all count


def median_seconds(
    candidates: Mapping[str, Callable[[int], object]], rounds: int, calls: int = 1
) -> dict[str, float]:
    """Time candidates in turns, so that what slows the machine down for a while slows all of them down.

    Each is called once before, untimed. Where the system tells (Linux), samples during which this process waited for
    a core are left out, as long as three others remain.

    Args:
        candidates: what to time, by name; is passed the number of the call, from 0 on in every round.
        rounds: how often every candidate has its turn.
        calls: timed calls of a turn, each of them a sample.

    Returns:
        Median seconds of a call, by name.
    """
    for run in candidates.values():
        run(0)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            for call in range(calls):
                waited, began = _seconds_waited(), time.perf_counter()
                run(call)
                seconds = time.perf_counter() - began
                samples[name].append((seconds, (_seconds_waited() - waited) / seconds))
    return {name: _undisturbed_median(timed) for name, timed in samples.items()}


def stream_bandwidth() -> float:
    """Bytes that torch's threads read from memory in a second, summing an array much larger than the caches."""
    array = torch.ones(STREAM_BYTES // 4)
    return array.nbytes / median_seconds({"read": lambda _: array.sum()}, STREAM_READS)["read"]


def _undisturbed_median(samples: list[tuple[float, float]]) -> float:
    undisturbed = [seconds for seconds, waited in samples if waited < DISTURBED]
    if len(undisturbed) < LEAST_SAMPLES:
        undisturbed = [seconds for seconds, _ in samples]
    return statistics.median(undisturbed)


def _seconds_waited() -> float:
    """Seconds that this process's threads have been ready to run without a core, all together; 0 if not known."""
    nanoseconds = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(file.read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel keeps no such count
            continue
    return nanoseconds / 1e9
