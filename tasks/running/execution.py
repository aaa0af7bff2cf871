"""Machine-side settings of a run. They do not change results, so they are not part of any key."""

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

    def hidden_states_room(self) -> HiddenStatesRoom:
        """Return an allocator of hidden states for one stage, by what is free on the device now."""
        device, on_device = self.torch_device, self.device_states_bytes
        if on_device is None:
            on_device = free_bytes(device) // 2
        return HiddenStatesRoom(self.hidden_states_bytes, self.scratch, device, on_device)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; 0 for the CPU, and for a device that does not tell."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    # Memory that torch keeps for later tensors is free for them.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
