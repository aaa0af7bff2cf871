"""Where and how work is done. Nothing here changes a result, so nothing here is part of a key."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Execution:
    """The machine's side of a run.

    Attributes:
        device: torch device that computes.
        hidden_states_bytes: hidden states beyond this many bytes lie in memory-mapped files.
        scratch: folder for those files.
        boundary_layers: commit a resume point after this many layers; None for by time only.
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
