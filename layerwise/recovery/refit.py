"""Refit: fit the remaining weights of a pruned linear to the dense model's outputs, in closed form, with a fixed mask.

The objective is ``||X w - y||^2`` per output. ``X`` are the inputs that the linear receives in the pruned model, and
``y = (1 - alpha) X w0 + alpha Z w0`` mixes the outputs of the dense weight ``w0`` on these inputs and on the inputs
``Z`` of the dense model. With ``alpha`` 0, the linear only makes up for its own pruning; with 1, also for the errors of
all earlier layers, which overfits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from layerwise.calibration.counted_tokens import counted_batches, counted_rows
from layerwise.calibration.few_tokens import tokens_for_moments
from layerwise.calibration.gram import require_full_float32
from layerwise.models.expert_names import expert_linear
from layerwise.models.experts import counted_by
from layerwise.models.skeleton import Linear
from layerwise.pruners.conjugate_gradient import minimize
from layerwise.recovery.linear_inputs import (
    LinearInputs,
    find_first_block,
    linears_by_input,
    refitted_together,
)
from layerwise.recovery.pruned_layer import (
    LayerToRecover,
    PrunedLinear,
    held_out_windows,
    weight_of,
    weights_replaced,
)

MOST_STEPS = 1000  # guards against a mistyped number that would make a run endless
# Weights that are refitted at a time: 0.3 GB for the five float32 copies.
REFITTED_ENTRIES = 1 << 24
# Gram matrices of experts that are collected in one pass over the windows.
MOMENTS_BYTES = 2 << 30
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
def refit_layer(pruned: LayerToRecover, settings: Refit) -> tuple[dict[str, Tensor], LinearInputs]:
    """Refit the linears of a layer in the order of the data flow, each on inputs that the refitted ones before it give.

    Linears that share their input are refitted together. Memory in addition to the layer: its dense and its new
    weights, and two float32 matrices of the inputs of one linear, and three while it is refitted; of experts, as many
    matrices as ``MOMENTS_BYTES`` holds. The linears of an expert that few tokens reach are not refitted.

    Returns:
        New weights by linear, and the kept inputs of the refitted layer in the pruned model.
    """
    weights: dict[str, Tensor] = {}
    fitted = len(pruned.hidden_states) - held_out_windows(settings, len(pruned.hidden_states))
    by_name = {each.linear.name: each for each in pruned.linears}
    block = find_first_block(pruned)
    room, dense_room = pruned.rooms
    inputs = LinearInputs(pruned, pruned.hidden_states[:fitted], block, room[:fitted])
    dense_inputs = LinearInputs(pruned, pruned.dense_states[:fitted], block, dense_room[:fitted])
    for groups in refitted_together(linears_by_input(pruned)):
        if expert_linear(groups[0][0]) is not None:
            # As many at a time as their matrices allow; each time costs a pass over the windows.
            size = 4 * by_name[groups[0][0]].linear.in_features ** 2
            count = max(1, MOMENTS_BYTES // size)
            for first in range(0, len(groups), count):
                some = groups[first : first + count]
                for names, moments in _moments_of_experts(
                    pruned, some, inputs, pruned.counted_in(slice(fitted)), weights, by_name
                ):
                    weights |= _refitted([by_name[name] for name in names], pruned, moments, settings)
            continue
        (names,) = groups
        linears = [by_name[name] for name in names]
        masks = counted_batches(pruned.counted_in(slice(fitted)))
        moments = Moments.empty([each.linear for each in linears], settings.alpha, pruned.model.device)
        for batch, counted in zip(range(len(inputs)), masks, strict=False):
            target = None
            if settings.alpha:
                with weights_replaced(pruned.layer, pruned.dense_weights):
                    target = dense_inputs.of(names, batch)
                if moments.of_outputs:
                    target = _outputs_of(linears, target)
                target = counted_rows(target, counted)
            with weights_replaced(pruned.layer, weights):
                moments.add(counted_rows(inputs.of(names, batch), counted), target)
        weights |= _refitted(linears, pruned, moments, settings)
    return weights, inputs


def _moments_of_experts(
    pruned: LayerToRecover,
    groups: Sequence[Sequence[str]],
    inputs: LinearInputs,
    counted_windows: Tensor | None,
    weights: Mapping[str, Tensor],
    by_name: Mapping[str, PrunedLinear],
) -> Iterator[tuple[Sequence[str], Moments]]:
    """Yield linears of experts that share their input, with their moments; experts with few tokens are left out.

    The target is the dense weight's output on the pruned model's inputs, whatever ``alpha``: the dense model may send other
    tokens to an expert.

    Args:
        counted_windows: mask of the tokens that count in ``inputs``; None for all.
    """
    every = [
        Moments.empty([by_name[name].linear for name in names], 0.0, pruned.model.device) for names in groups
    ]
    tokens = [0] * len(groups)
    for batch, counted in zip(range(len(inputs)), counted_batches(counted_windows), strict=False):
        with weights_replaced(pruned.layer, weights):
            found = inputs.of_several(groups, batch)
        for number, (names, moments, of_expert) in enumerate(zip(groups, every, found, strict=True)):
            rows = None if counted is None else counted_by(pruned.layer, names[0], counted)
            of_expert = counted_rows(of_expert, rows)
            moments.add(of_expert, None)
            tokens[number] += of_expert.shape[:-1].numel()
    for names, moments, count in zip(groups, every, tokens, strict=True):
        if count >= tokens_for_moments(len(moments.gram)):
            yield names, moments


def _refitted(
    linears: Sequence[PrunedLinear], pruned: LayerToRecover, moments: Moments, settings: Refit
) -> dict[str, Tensor]:
    """Return the new weights of linears that share their input."""
    prepared = moments.prepare(settings.damping)
    weights, first = {}, 0
    for each in linears:
        oriented, last = each.linear.oriented, first + each.linear.out_features
        current = weight_of(pruned.layer, each.linear.name).to(each.dtype)
        new = refitted(
            oriented(each.dense),
            oriented(current),
            oriented(each.mask),
            prepared,
            settings.steps,
            slice(first, last),
        )
        weights[each.linear.name] = oriented(new).contiguous()
        first = last
    return weights


def _outputs_of(linears: Sequence[PrunedLinear], inputs: Tensor) -> Tensor:
    """Return the outputs of the dense weights of several linears without bias, one after the other."""
    return torch.cat([linear(inputs, each.linear.oriented(each.dense)) for each in linears], dim=-1)


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the inputs ``x`` of linears in the pruned model, and of these with the dense model's tokens.

    ``gram`` is the sum of ``x x^T`` over the tokens. ``cross`` is the sum of ``z x^T``, with the input ``z`` of the same
    token in the dense model; or of ``y x^T``, with the dense model's outputs ``y`` of the linears one after the other,
    where these are fewer. Products and sums are in float32.

    Attributes:
        gram: shape ``(in_features, in_features)``, float32.
        cross: shape ``(in_features, in_features)`` or ``(outputs, in_features)``, float32; None if alpha is 0.
        of_outputs: whether ``cross`` has outputs.
        alpha: share of the dense model's outputs in the target.
    """

    gram: Tensor
    cross: Tensor | None
    of_outputs: bool
    alpha: float

    @classmethod
    def empty(cls, linears: Sequence[Linear], alpha: float, device: torch.device) -> Moments:
        """Return the moments of no tokens, for linears that share their input."""
        require_full_float32()
        in_features, outputs = linears[0].in_features, sum(each.out_features for each in linears)
        gram = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        of_outputs = outputs < in_features
        cross = gram.new_zeros(outputs if of_outputs else in_features, in_features) if alpha else None
        return cls(gram, cross, of_outputs, alpha)

    def add(self, inputs: Tensor, target: Tensor | None) -> None:
        """Add one batch.

        Args:
            inputs: inputs in the pruned model, shape ``(..., in_features)``, any dtype.
            target: inputs or outputs of the same tokens in the dense model, see ``of_outputs``; None if alpha is 0.
        """
        own = inputs.reshape(-1, len(self.gram)).float()
        for start in range(0, len(self.gram), PANEL):
            stop = start + PANEL
            self.gram[start:stop, start:].addmm_(own[:, start:stop].T, own[:, start:])
            self.gram[stop:, start:stop] = self.gram[start:stop, stop:].T
        if self.cross is not None:
            assert target is not None, "alpha is not 0"
            self.cross.addmm_(target.reshape(len(own), -1).float().T, own)

    def prepare(self, damping: float) -> RefitInput:
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

    moments: Moments
    scale: Tensor  # (in_features,), float32: 1 / sqrt(sum of squares + damping)
    hessian: Tensor  # (in_features, in_features), float32: damped second moments, scaled to diagonal 1


def refitted(
    dense: Tensor,
    pruned: Tensor,
    mask: Tensor,
    inputs: RefitInput,
    steps: int,
    outputs: slice = slice(None),
) -> Tensor:
    """Fit the remaining entries of ``pruned``, starting from their values.

    Args:
        dense: dense weight, shape ``(out_features, in_features)``.
        pruned: pruned weight, same shape, zero where ``mask`` is ``True``; left unchanged.
        mask: same shape, ``True`` means "removed".
        steps: number of conjugate-gradient steps.
        outputs: position of this linear's outputs among those of all linears that share the inputs.

    Returns:
        New weight in the dtype of ``pruned``, zero where ``mask`` is ``True``. Computed in float32.
    """
    moments = inputs.moments
    result = torch.empty_like(pruned)
    rows = max(1, REFITTED_ENTRIES // pruned.shape[1])
    for first in range(0, len(pruned), rows):
        some = slice(first, first + rows)
        start = pruned[some].to(torch.float32, copy=True)
        original, fixed = dense[some].float(), mask[some]
        residual = ((1 - moments.alpha) * original - start) @ moments.gram
        if moments.cross is not None:
            cross = moments.cross[outputs][some] if moments.of_outputs else original @ moments.cross
            residual.add_(cross, alpha=moments.alpha)
        residual.mul_(inputs.scale).masked_fill_(fixed, 0)
        change = minimize(torch.zeros_like(start), residual, inputs.hessian, fixed, steps)
        new = change.mul_(inputs.scale).add_(start).masked_fill_(fixed, 0)
        result[some] = converted(new, pruned.dtype)
    return result


def converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a weight so that no other entry becomes zero, which would change the sparsity (possible in float16)."""
    converted = weight.to(dtype)
    vanished = (converted == 0) & (weight != 0)
    least = torch.finfo(dtype).smallest_normal
    return torch.where(vanished, torch.where(weight < 0, -least, least).to(dtype), converted)
