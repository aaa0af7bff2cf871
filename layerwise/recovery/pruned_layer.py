"""A pruned decoder layer that is to be recovered: its linears, the calibration windows that reach it, and its error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from layerwise.calibration.counted_tokens import counted_batches, counted_rows
from layerwise.models.hidden_states import batches
from layerwise.models.skeleton import Linear

if TYPE_CHECKING:  # takes seconds: too long for a command that only validates settings
    from layerwise.models.streaming import StreamedModel


class HoldsOut(Protocol):
    """Settings that hold a share of the calibration windows out."""

    @property
    def held_out(self) -> float: ...


@dataclass(frozen=True)
class PrunedLinear:
    """A pruned linear of the layer to recover; all tensors in the orientation of the module's weight.

    Attributes:
        dense: weight before pruning, in the dtype of the computation.
        mask: ``True`` where the weight was removed.
        stored: weight in the checkpoint's dtype, which recovered weights have. Only values that are not removed are read:
            the others may be zero already.
    """

    linear: Linear
    dense: Tensor
    mask: Tensor
    stored: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the checkpoint."""
        return self.stored.dtype


@dataclass(frozen=True)
class LayerToRecover:
    """A pruned decoder layer, and the calibration windows that reach it.

    Attributes:
        model: runs the layer.
        index: index of the layer.
        layer: the layer, with its pruned weights; they are the same after the recovery.
        linears: linears that lost weights.
        hidden_states: states before the layer in the pruned model, shape ``(windows, seqlen, layout.size)``.
        dense_states: states before the layer in the dense model, same shape.
        rooms: two tensors of the same shape that the recovery may overwrite.
        counted: mask of the tokens that targets and errors use, shape ``(windows, seqlen)``; None for all.
    """

    model: StreamedModel
    index: int
    layer: nn.Module
    linears: Sequence[PrunedLinear]
    hidden_states: Tensor
    dense_states: Tensor
    rooms: tuple[Tensor, Tensor]
    counted: Tensor | None = None

    def counted_in(self, windows: slice) -> Tensor | None:
        """Return the mask of some windows; None if all tokens count."""
        return None if self.counted is None else self.counted[windows]

    def run(self, hidden_states: Tensor) -> Tensor:
        """Return the layer's output with its current weights for a state."""
        return self.model.hidden_states(self.model.run_layer(self.index, self.layer, hidden_states))

    @property
    def dense_weights(self) -> dict[str, Tensor]:
        """Weights before pruning, by linear."""
        return {each.linear.name: each.dense for each in self.linears}


def held_out_windows(settings: HoldsOut, windows: int) -> int:
    """Return the number of calibration windows that are not fitted on: the last ones, at least one.

    Args:
        windows: number of calibration windows.

    Raises:
        ValueError: no window would be left to fit on.
    """
    held_out = max(1, round(settings.held_out * windows))
    if held_out >= windows:
        raise ValueError(
            f"recovery holds {held_out} of {windows} calibration windows out and has none left to fit on. Use more "
            "calibration windows, or a smaller held_out."
        )
    return held_out


@torch.no_grad()
def relative_errors(
    pruned: LayerToRecover, candidates: Sequence[Mapping[str, Tensor]], alpha: float, held_out: int
) -> list[float]:
    """Return the errors of a layer with different weights on the tokens that count in its last ``held_out`` windows.

    See ``RecoveryOutcome``.

    Args:
        candidates: weights that replace the pruned ones, by linear.
    """
    totals = torch.zeros(len(candidates), dtype=torch.float64, device=pruned.model.device)
    tokens = 0
    windows = slice(-held_out, None)
    for states, dense_states, counted in zip(
        batches(pruned.hidden_states[windows]),
        batches(pruned.dense_states[windows]),
        counted_batches(pruned.counted_in(windows)),
        strict=False,  # a mask of all tokens has no end
    ):
        target = counted_rows(target_output(pruned, states, dense_states, alpha), counted)
        for number, weights in enumerate(candidates):
            with weights_replaced(pruned.layer, weights):
                error = counted_rows(pruned.run(states).float(), counted) - target
            totals[number] += (error.square().sum(dim=-1) * weight_of_tokens(target)).sum(dtype=torch.float64)
        tokens += target.shape[:-1].numel()
    return [total / tokens for total in totals.cpu().tolist()]


def weight_of_tokens(target: Tensor) -> Tensor:
    """Return ``1 / ||y||^2`` of every token; 0 for a token whose target is zero, which has no relative error.

    Args:
        target: shape ``(..., hidden_size)``.
    """
    energy = target.square().sum(dim=-1)
    return torch.where(energy > 0, 1 / energy, 0)


@torch.no_grad()
def target_output(pruned: LayerToRecover, states: Tensor, dense_states: Tensor, alpha: float) -> Tensor:
    """Return the output that the recovered layer should have, in float32.

    Args:
        states: hidden states of the pruned model.
        dense_states: hidden states of the same tokens in the dense model.
        alpha: share of the dense layer's output on ``dense_states``; the rest is its output on ``states``.
    """
    with weights_replaced(pruned.layer, pruned.dense_weights):
        target = pruned.run(states).float()
        if alpha:
            target = torch.lerp(target, pruned.run(dense_states).float(), alpha)
    return target


@contextmanager
def weights_replaced(layer: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the weights of some linears, given by name, within the block; converted to the module's dtype."""
    modules = {name: layer.get_submodule(name) for name in weights}
    before = {name: weight_of(layer, name) for name in weights}
    try:
        for name, module in modules.items():
            weight = weights[name].to(before[name].device, before[name].dtype)
            module.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for name, module in modules.items():
            module.weight = before[name]  # type: ignore[assignment]


def weight_of(layer: nn.Module, name: str) -> Tensor:
    """Return the current weight of one linear, in the orientation of the module."""
    return layer.get_submodule(name).weight  # type: ignore[return-value]
