"""Copies of a layer's weights on the device: each weight crosses once, while the layer before it computes."""

from collections.abc import Mapping

import torch
from torch import Tensor


class DeviceCopies:
    """Copies of layers on a device. On the CPU, the tensors themselves.

    Args:
        device: device of the computation.

    Attributes:
        in_background: whether ``begin`` copies, so that it belongs in the thread that reads. Its tensors should then be in
            pinned memory, and may be overwritten as soon as it returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.in_background = device.type == "cuda"
        # A stream of its own: the copies do not wait for the computation, nor the computation for them.
        self._stream = torch.cuda.Stream(device) if self.in_background else None

    def begin(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy to a CUDA device; return the tensors themselves for any other."""
        if self._stream is None:
            return dict(weights)
        with torch.cuda.stream(self._stream):
            copies = {name: weight.to(self._device, non_blocking=True) for name, weight in weights.items()}
        self._stream.synchronize()
        return copies

    def finish(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what ``begin`` has returned, on the device, for use in the calling thread."""
        if self._stream is None:
            return {name: weight.to(self._device) for name, weight in weights.items()}
        for weight in weights.values():
            # Its memory must not be used for the next copy before the computation has read it.
            weight.record_stream(torch.cuda.current_stream(self._device))
        return dict(weights)
