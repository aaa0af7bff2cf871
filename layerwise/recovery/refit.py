"""Refit: fit the remaining weights of a pruned linear to the dense model's outputs, in closed form, with a fixed mask.

The objective is ``||X w - y||^2`` per output. ``X`` are the inputs that the linear receives in the pruned model, and
``y = (1 - alpha) X w0 + alpha Z w0`` mixes the outputs of the dense weight ``w0`` on these inputs and on the inputs
``Z`` of the dense model. With ``alpha`` 0, the linear only makes up for its own pruning; with 1, also for the errors of
all earlier layers, which overfits.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.calibration.gram import require_full_float32
from layerwise.models.hidden_states import batches
from layerwise.pruners.conjugate_gradient import minimize
from layerwise.recovery.kept_output import KeptOutput
from layerwise.recovery.pruned_layer import (
    LayerToRecover,
    held_out_windows,
    inputs_of,
    linears_by_input,
    weight_of,
    weights_replaced,
)

MOST_STEPS = 1000  # guards against a mistyped number that would make a run endless
# Weights that are refitted at a time: 0.3 GB for the five float32 copies.
REFITTED_ENTRIES = 1 << 24
# Columns of the Gram matrix that are computed at a time: the blocks on and right of the diagonal; the others are mirrored.
PANEL = 256


@dataclass(frozen=True)
class Refit:
    """Fit the remaining weights of every linear by a few conjugate-gradient steps.

    Attributes:
        alpha: share of the dense model's own outputs in the target, from 0 to 1.
        steps: number of conjugate-gradient steps.
        damping: ridge that pulls towards the pruned weight, as a fraction of the inputs' mean square.
        held_out: share of the calibration windows that is not fitted on. A layer is refitted only if this lowers its
            error on these windows.
    """

    method: Literal["refit"] = "refit"
    alpha: float = 0.25
    steps: int = 8
    damping: float = 0.01
    held_out: float = 0.125

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha:g}; it must be from 0 to 1.")
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps is {self.steps}; it must be from 1 to {MOST_STEPS}.")
        if not 0 <= self.damping < math.inf:
            raise ValueError(
                f"damping is {self.damping:g}; it must be 0 or more and finite. Give a fraction of the inputs' mean "
                "square, e.g. 0.01."
            )
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"held_out is {self.held_out:g}; it must be between 0 and 1. Give the share of the calibration windows "
                "that decides whether a layer is refitted, e.g. 0.125."
            )


@torch.no_grad()
def refit_layer(pruned: LayerToRecover, settings: Refit) -> dict[str, Tensor]:
    """Refit the linears of a layer in the order of the data flow, each on inputs that the refitted ones before it give.

    Linears that share their input are refitted together. Memory in addition to the layer: its dense and its new
    weights, and two float32 matrices of the inputs of one linear, and three while it is refitted.
    """
    weights: dict[str, Tensor] = {}
    windows = len(pruned.hidden_states) - held_out_windows(settings, len(pruned.hidden_states))
    by_name = {each.linear.name: each for each in pruned.linears}
    kept, kept_dense = (KeptOutput(pruned.layer, by_name, room) for room in pruned.rooms)
    for names in linears_by_input(pruned):
        moments = MixedMoments.empty(
            by_name[names[0]].linear.in_features, settings.alpha, pruned.model.device
        )
        first = 0
        for states, dense_states in zip(
            batches(pruned.hidden_states[:windows]), batches(pruned.dense_states[:windows]), strict=True
        ):
            batch = slice(first, first + len(states))
            dense_inputs = None
            if settings.alpha:
                with (
                    weights_replaced(pruned.layer, pruned.dense_weights),
                    kept_dense.in_pass(batch, names[0], by_name),
                ):
                    dense_inputs = inputs_of(pruned, names[0], dense_states)
            with weights_replaced(pruned.layer, weights), kept.in_pass(batch, names[0], weights):
                moments.add(inputs_of(pruned, names[0], states), dense_inputs)
            first = batch.stop
        prepared = moments.prepare(settings.damping)
        for name in names:
            each = by_name[name]
            oriented = each.linear.oriented
            current = weight_of(pruned.layer, name).to(each.dtype)
            fitted = refitted(
                oriented(each.dense), oriented(current), oriented(each.mask), prepared, settings.steps
            )
            weights[name] = oriented(fitted).contiguous()
    return weights


@dataclass(frozen=True, eq=False)
class MixedMoments:
    """Second moments of a linear's inputs in the pruned model, and of these with the inputs of the target.

    With ``x`` the input of a token in the pruned model and ``z`` in the dense model, the matrices are the sums of
    ``x x^T`` and of ``((1 - alpha) x + alpha z) x^T``. Products and sums are in float32. Memory: 8 bytes per entry, 4
    if alpha is 0.
    """

    gram: Tensor  # (in_features, in_features), float32
    target: Tensor  # (in_features, in_features), float32; the same tensor as gram if alpha is 0
    alpha: float

    @classmethod
    def empty(cls, in_features: int, alpha: float, device: torch.device) -> "MixedMoments":
        require_full_float32()
        gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        return cls(gram, torch.zeros_like(gram) if alpha else gram, alpha)

    def add(self, inputs: Tensor, dense_inputs: Tensor | None) -> None:
        """Add one batch.

        Args:
            inputs: inputs in the pruned model, shape ``(..., in_features)``, any dtype.
            dense_inputs: inputs of the same tokens in the dense model, same shape; None if alpha is 0.
        """
        own = inputs.reshape(-1, len(self.gram)).float()
        for start in range(0, len(self.gram), PANEL):
            stop = start + PANEL
            self.gram[start:stop, start:].addmm_(own[:, start:stop].T, own[:, start:])
            self.gram[stop:, start:stop] = self.gram[start:stop, stop:].T
        if dense_inputs is not None:
            mixed = torch.lerp(own, dense_inputs.reshape(own.shape).float(), self.alpha)
            self.target.addmm_(mixed.T, own)

    def prepare(self, damping: float) -> "RefitInput":
        """Scale the moments to a constant diagonal, once for all linears that share the inputs.

        Args:
            damping: fraction of the mean square of the inputs that is added to the diagonal.
        """
        diagonal = self.gram.diagonal().double()
        damped = diagonal + damping * diagonal.mean()
        scale = torch.where(damped > 0, damped.rsqrt(), 0).float()  # 0: an input that was always zero
        hessian = (self.gram * scale).mul_(scale[:, None])
        hessian.diagonal().fill_(1)
        return RefitInput(self, scale, hessian)


@dataclass(frozen=True, eq=False)
class RefitInput:
    """Moments of the inputs of some linears, prepared for ``refitted``."""

    moments: MixedMoments
    scale: Tensor  # (in_features,), float32: 1 / sqrt(sum of squares + damping)
    hessian: Tensor  # (in_features, in_features), float32: damped second moments, scaled to diagonal 1


def refitted(dense: Tensor, pruned: Tensor, mask: Tensor, inputs: RefitInput, steps: int) -> Tensor:
    """Fit the remaining entries of ``pruned``, starting from their values.

    Args:
        dense: dense weight, shape ``(out_features, in_features)``.
        pruned: pruned weight, same shape, zero where ``mask`` is ``True``; left unchanged.
        mask: same shape, ``True`` means "removed".
        steps: number of conjugate-gradient steps.

    Returns:
        New weight in the dtype of ``pruned``, zero where ``mask`` is ``True``. Computed in float32.
    """
    result = torch.empty_like(pruned)
    rows = max(1, REFITTED_ENTRIES // pruned.shape[1])
    for first in range(0, len(pruned), rows):
        some = slice(first, first + rows)
        start = pruned[some].to(torch.float32, copy=True)
        fixed = mask[some]
        residual = dense[some].float() @ inputs.moments.target
        residual.sub_(start @ inputs.moments.gram).mul_(inputs.scale).masked_fill_(fixed, 0)
        change = minimize(torch.zeros_like(start), residual, inputs.hessian, fixed, steps)
        fitted = change.mul_(inputs.scale).add_(start).masked_fill_(fixed, 0)
        result[some] = converted(fitted, pruned.dtype)
    return result


def converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a weight so that no other entry becomes zero, which would change the sparsity (possible in float16)."""
    converted = weight.to(dtype)
    vanished = (converted == 0) & (weight != 0)
    least = torch.finfo(dtype).smallest_normal
    return torch.where(vanished, torch.where(weight < 0, -least, least).to(dtype), converted)
