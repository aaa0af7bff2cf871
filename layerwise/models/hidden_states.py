"""Storage for hidden states: in memory up to a budget, then in memory-mapped files that the system can page out."""

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
        budget: bytes to keep in memory; further tensors are in files.
        folder: folder of those files. The files have no name, so a killed process leaves nothing behind.
    """

    def __init__(self, budget: int, folder: Path) -> None:
        self._left, self._folder = budget, folder
        self.spilled = 0  # bytes in files

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized CPU tensor.

        Raises:
            OSError: the disk is too full for a tensor beyond the budget.
        """
        numel = math.prod(shape)
        size = numel * dtype.itemsize
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
