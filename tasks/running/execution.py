"""Machine-side settings of a run. They do not change results, so they are not part of any key."""

import ctypes
import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.models.hidden_states import HiddenStatesRoom


@dataclass(frozen=True)
class Execution:
    """Device, memory limit, and intervals between resume points.

    Attributes:
        device: torch device to compute on.
        hidden_states_bytes: maximum size of hidden states in memory; more are kept in memory-mapped files.
        scratch: folder for those files.
        device_states_bytes: maximum size of hidden states on a device other than the CPU; None for half of the memory
            that is free on it.
        boundary_layers: commit a resume point after this many layers; None: only ``boundary_seconds`` counts.
        boundary_seconds: commit a resume point at the first layer boundary after this time.
    """

    device: str = "cpu"
    hidden_states_bytes: int = 4 << 30
    scratch: Path = Path(tempfile.gettempdir())
    device_states_bytes: int | None = None
    boundary_layers: int | None = None
    boundary_seconds: float = 300.0

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def most_device_states_bytes(self) -> int:
        """Maximum size of hidden states on the device, by what is free on it now; 0 on the CPU."""
        if self.torch_device.type == "cpu":
            return 0
        if self.device_states_bytes is not None:
            return self.device_states_bytes
        memory = device_memory(self.torch_device)
        return 0 if memory is None else memory.free // 2

    def hidden_states_room(self) -> HiddenStatesRoom:
        """Return an allocator of hidden states for one stage, by what is free on the device now."""
        return HiddenStatesRoom(
            self.hidden_states_bytes, self.scratch, self.torch_device, self.most_device_states_bytes
        )


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device other than the CPU, in bytes.

    Attributes:
        free: what this process can still use, including what torch keeps for later tensors.
        taken: what all processes use, including what torch keeps.
    """

    free: int
    taken: int
    total: int


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Return the memory of a device; None for the CPU, and for a device that does not tell.

    Raises:
        RuntimeError: this machine does not have the device.
    """
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(device)
    kept = module.memory_reserved(device) - module.memory_allocated(device)
    return DeviceMemory(free + kept, total - free, total)


def release_memory(device: torch.device) -> None:
    """Free the memory of unreachable tensors, and what torch keeps of it for later tensors on ``device``."""
    gc.collect()
    module = torch.get_device_module(device)
    if hasattr(module, "empty_cache"):
        module.empty_cache()


def return_freed_memory() -> None:
    """Return freed memory of this process to the system, if the C library can do that (glibc).

    A recovery needs temporary tensors of many sizes. glibc keeps freed blocks that later tensors do not fit into, so the process
    would grow from layer to layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
