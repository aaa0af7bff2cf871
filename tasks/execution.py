"""Where and how work is done. Nothing here changes a result, so nothing here is part of a key."""

import tempfile
import time
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


class BoundaryClock:
    """Says at which layer boundaries a resume point is due."""

    def __init__(self, execution: Execution) -> None:
        self._layers, self._seconds = execution.boundary_layers, execution.boundary_seconds
        self._last_time, self._since = time.monotonic(), 0

    def due(self) -> bool:
        """Call once after every layer; ``restart`` after the resume point is committed."""
        self._since += 1
        by_layers = self._layers is not None and self._since >= self._layers
        return by_layers or time.monotonic() - self._last_time >= self._seconds

    def restart(self) -> None:
        """Count anew from here: time spent on committing a resume point must not make the next one due."""
        self._last_time, self._since = time.monotonic(), 0
