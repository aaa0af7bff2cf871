"""Speed of dtypes: warn before a long run if the device has no fast instructions for the dtype."""

import logging
import time

import torch

from layerwise.tasks.models.streamed import DTYPES
from layerwise.tasks.running.execution import Execution

logger = logging.getLogger(__name__)

SIZE = 256  # of the multiplied matrices: milliseconds, even without instructions for the dtype
TOLERABLE = 4.0  # times slower: allows for instructions of half the width, and noise


def times_slower_than_float32(dtype: str, execution: Execution) -> float:
    """Measure how many times longer a matrix product takes in ``dtype`` than in float32."""

    def seconds(in_dtype: torch.dtype) -> float:
        one = torch.ones(SIZE, SIZE, dtype=in_dtype, device=execution.torch_device)
        taken = []
        for _ in range(3):  # the first product also loads the kernel
            began = time.perf_counter()
            (one @ one)[0, 0].item()
            taken.append(time.perf_counter() - began)
        return min(taken)

    return seconds(DTYPES[dtype]) / seconds(torch.float32)


def fast_dtype(execution: Execution) -> str:
    """Return "bfloat16", or "float32" if the device multiplies bfloat16 more than ``TOLERABLE`` times slower."""
    return "float32" if times_slower_than_float32("bfloat16", execution) > TOLERABLE else "bfloat16"


def warn_if_slow(dtype: str, execution: Execution) -> None:
    """Warn if float32 would be several times faster on this device."""
    if dtype == "float32":
        return
    slower = times_slower_than_float32(dtype, execution)
    if slower > TOLERABLE:
        logger.warning(
            "%s has no fast instructions for %s: a matrix product takes %.0f times as long as in float32. Set dtype to "
            "float32 (--dtype float32), or use a device that has such instructions.",
            execution.device,
            dtype,
            slower,
        )
