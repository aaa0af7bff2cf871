"""Storage for hidden states: on the device, then in this machine's memory, then in memory-mapped files.

The system can page the files out.
"""

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from layerwise.display.byte_size import size_in

# Tokens per forward pass of one layer: enough for efficient matrix products, with activations that are small compared
# with a layer's weights. This is not a setting, because the shape of a batch determines the order of additions and so
# the last bits of every result.
TOKENS_PER_FORWARD = 4096


def batches(windows: Tensor) -> tuple[Tensor, ...]:
    """Split ``windows``, shape ``(windows, seqlen, ...)``, into views with the number of windows of one forward pass."""
    return windows.split(max(1, TOKENS_PER_FORWARD // windows.shape[1])) if len(windows) else ()


class HiddenStatesRoom:
    """Allocator of tensors for hidden states.

    Args:
        budget: bytes to keep in this machine's memory; further tensors are in files.
        folder: folder of those files. The files have no name, so a killed process leaves nothing behind.
        device: device of the computation.
        device_budget: bytes to keep on a device other than the CPU; the first tensors are there.
    """

    def __init__(
        self,
        budget: int,
        folder: Path,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
        device_budget: int = 0,
    ) -> None:
        self._left, self._folder, self._device = budget, folder, device
        self._left_on_device = 0 if device.type == "cpu" else device_budget
        self.spilled = 0  # bytes in files

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor, on the device or on the CPU.

        Raises:
            OSError: the disk is too full for a tensor beyond the budgets.
        """
        numel = math.prod(shape)
        size = numel * dtype.itemsize
        if size <= self._left_on_device:
            self._left_on_device -= size
            return torch.empty(shape, dtype=dtype, device=self._device)
        pinned = 1 << max(size - 1, 0).bit_length()  # torch rounds pinned memory up to a power of two
        if self._device.type == "cuda" and pinned <= self._left:
            self._left -= pinned
            return torch.empty(shape, dtype=dtype, pin_memory=True)  # copied several times as fast
        if size <= self._left:
            self._left -= size
            return torch.empty(shape, dtype=dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix="hidden_states-", dir=self._folder)
        try:
            # Reserve the space now: writing through a mapping to a full disk would kill the process with SIGBUS.
            os.posix_fallocate(descriptor, 0, size)
            tensor = torch.from_file(path, shared=True, size=numel, dtype=dtype)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{size_in('GiB', size, 2)} of hidden states do not fit in {self._folder} ({error.strerror}). "
                "Free disk space, choose another scratch folder, or use fewer windows or betas.",
            ) from error
        finally:
            os.close(descriptor)
            os.unlink(path)
        self.spilled += size
        return tensor.view(shape)
