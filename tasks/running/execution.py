"""Machine-side settings of a run. They do not change results, so they are not part of any key."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Execution:
    """Device, memory limit, and intervals between resume points.

    Attributes:
        device: torch device to compute on.
        hidden_states_bytes: maximum size of hidden states in memory; more are kept in memory-mapped files.
        scratch: folder for those files.
        boundary_layers: commit a resume point after this many layers; None: only ``boundary_seconds`` counts.
        boundary_seconds: commit a resume point at the first layer boundary after this time.
    """

    device: str = "cpu"
    hidden_states_bytes: int = 4 << 30
    scratch: Path = Path(tempfile.gettempdir())
    boundary_layers: int | None = None
    boundary_seconds: float = 300.0

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)
