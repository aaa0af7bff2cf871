"""Room for hidden states: in memory up to a budget, beyond it in memory-mapped files that the system pages out."""

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from layerwise.display.byte_size import size_in

# Tokens per forward pass of one layer: enough to keep the matrix products busy, small beside a layer's
# weights.
# A constant and no setting: the batch's shape decides the order of additions, and so the last bits of every
# result.
TOKENS_PER_FORWARD = 4096


def batches(windows: Tensor) -> tuple[Tensor, ...]:
    """Views of ``windows``, shape ``(windows, seqlen, ...)``, of as many windows as one forward pass takes."""
    return windows.split(max(1, TOKENS_PER_FORWARD // windows.shape[1])) if len(windows) else ()


class HiddenStatesRoom:
    """Hands out tensors for hidden states.

    Args:
        budget: bytes to keep in memory; what goes beyond lies in files.
        folder: where those files are made; they have no name, so that a killed process leaves nothing behind.
    """

    def __init__(self, budget: int, folder: Path) -> None:
        self._left, self._folder = budget, folder
        self.spilled = 0  # bytes that lie in files

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised CPU tensor.

        Raises:
            OSError: no room on the disk for a tensor that goes beyond the budget.
        """
        numel = math.prod(shape)
        size = numel * dtype.itemsize
        if size <= self._left:
            self._left -= size
            return torch.empty(shape, dtype=dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix="hidden_states-", dir=self._folder)
        try:
            # Reserved now: writing through a mapping into a full disk would kill the process with SIGBUS.
            os.posix_fallocate(descriptor, 0, size)
            tensor = torch.from_file(path, shared=True, size=numel, dtype=dtype)
        except OSError as error:
            raise OSError(
                error.errno,
                f"no room for {size_in('GiB', size, 2)} of hidden states in {self._folder} ({error.strerror}). "
                "Free disk space, choose another scratch folder, or use fewer windows or betas.",
            ) from error
        finally:
            os.close(descriptor)
            os.unlink(path)
        self.spilled += size
        return tensor.view(shape)
