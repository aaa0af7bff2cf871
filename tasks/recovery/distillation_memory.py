"""Memory that a distillation needs, estimated and compared with the memory that is free before any work."""

from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from layerwise.display.byte_size import size
from layerwise.models.skeleton import Linear
from layerwise.recovery.distillation import LOSS_POSITIONS
from layerwise.tasks.running.execution import device_memory

FLOAT32, BFLOAT16 = 4, 2  # bytes
# Tensors of logits in float32 at a time: student, teacher, both log-softmaxes, divergence, gradient.
LOGITS = 6
# Bytes that a layer keeps for the backward pass for each token and each feature that enters or leaves a linear. Measured
# on SmolLM2-135M in bfloat16, windows of 512 tokens.
ACTIVATION = 4


@dataclass(frozen=True)
class DistillationMemory:
    """Bytes that a distillation needs, by content.

    Attributes:
        parts: bytes by content, with the activations of the backward pass as small as they can be.
        activations: bytes of the activations of all layers, if they are kept instead of computed again.
    """

    parts: Mapping[str, int]
    activations: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def require(self, device: torch.device) -> bool:
        """Check that the memory suffices, and return whether the activations have to be computed again.

        Raises:
            ValueError: there is too little free memory on ``device``.
        """
        free = free_memory(device)
        if self.total > free:
            parts = ", ".join(f"{name} {size(count)}" for name, count in self.parts.items() if count)
            slowly = "" if device.type == "cpu" else ", or --device cpu, which is slow"
            raise ValueError(
                f"the distillation needs about {size(self.total)} of memory ({parts}), but {size(free)} are free on "
                f"{device}. The whole model is trained in memory: use a smaller model or a larger machine{slowly}."
            )
        return self.total + self.activations > free


def distillation_memory(
    linears: list[Linear],
    layers: int,
    parameters: int,
    stored: torch.dtype,
    computed: torch.dtype,
    seqlen: int,
    hidden_size: int,
    vocab_size: int,
    teacher_states: int,
) -> DistillationMemory:
    """Estimate the memory on the device. The teacher runs layer by layer, and before the student is loaded.

    Args:
        linears: trained linears of all layers.
        layers: number of decoder layers.
        parameters: number of all weights of the model.
        stored: dtype of the checkpoint.
        computed: dtype of the computation.
        teacher_states: bytes of the dense model's hidden states on the device.
    """
    trained = sum(linear.numel for linear in linears)
    kept = seqlen * sum(linear.in_features + linear.out_features for linear in linears) * ACTIVATION
    inputs = layers * seqlen * hidden_size * computed.itemsize
    return DistillationMemory(
        {
            "other weights": (parameters - trained) * computed.itemsize,
            "trained weights in float32": trained * FLOAT32,
            "their copies for the computation": trained * BFLOAT16 if computed != torch.float32 else 0,
            "gradients": trained * FLOAT32,
            "moments of AdamW": 2 * trained * FLOAT32,
            "masks": trained,
            "best weights": trained * stored.itemsize,
            "hidden states of the dense model": teacher_states,
            "logits": LOGITS * min(seqlen, LOSS_POSITIONS) * vocab_size * FLOAT32,
            "activations": inputs + kept // layers,
        },
        kept,
    )


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on ``device``; those of this machine for a device that does not tell."""
    memory = device_memory(device)
    return int(psutil.virtual_memory().available) if memory is None else memory.free
