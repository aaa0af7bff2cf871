"""Recovery of one pruned decoder layer, given the hidden states that reach it in the pruned and in the dense model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.models.expert_names import expert_linear
from layerwise.models.skeleton import Linear
from layerwise.recovery.linear_inputs import LinearInputs
from layerwise.recovery.pruned_layer import LayerToRecover, PrunedLinear, held_out_windows, relative_errors
from layerwise.recovery.refit import MOMENTS_BYTES, REFITTED_ENTRIES, Refit, refit_layer
from layerwise.recovery.train import TRAINED_ALPHA, TRAINED_BYTES, Train, train_layer

Recovery = Refit | Train


def recovery_bytes(settings: Recovery, linears: Sequence[Linear], itemsize: int) -> int:
    """Return the memory of the recovery of one layer, in addition to the layer and the hidden states.

    Args:
        linears: linears of the layer.
        itemsize: bytes per weight in the dtype of the computation.
    """
    weights = sum(linear.numel for linear in linears)
    kept = weights * (2 * itemsize + 1)  # dense and recovered weights, masks
    widest, largest = (max(getattr(each, name) for each in linears) for name in ("in_features", "numel"))
    refit = 3 * 4 * widest**2 + 5 * 4 * min(REFITTED_ENTRIES, largest)
    experts = {place.name for linear in linears if (place := expert_linear(linear.name)) is not None}
    if experts:  # the moments of many experts are collected together
        refit += min(MOMENTS_BYTES, 4 * widest**2 * len(experts))
    return kept + (refit if isinstance(settings, Refit) else max(refit, TRAINED_BYTES * weights))


@dataclass(frozen=True)
class RecoveryOutcome:
    """Error of a layer on the held-out calibration windows: mean over the tokens of ``||e||^2 / ||y||^2``.

    ``e`` is the difference of the layer's output from ``y``, the target of the method. After a refit, ``y`` mixes the
    dense layer's outputs on the pruned and on the dense model's hidden states by ``Refit.alpha``. After training, it is
    the dense layer's output on the pruned model's hidden states.

    Attributes:
        before: error of the pruned layer.
        after: error of the recovered layer. The layer keeps its pruned weights if this is not smaller.
    """

    before: float
    after: float

    @property
    def accepted(self) -> bool:
        """Whether the recovered weights are used."""
        return self.after < self.before


@dataclass(frozen=True)
class RecoveredLayer:
    """Result of the recovery of one layer.

    Attributes:
        weights: new weights by linear, in the checkpoint's dtype and in the orientation of the module's weight, zero
            exactly where the pruned weights are; empty if they were not accepted.
        outcome: the errors that decided on it; None if the layer was not recovered now.
        inputs: inputs of the layer's linears with these weights, which shorten the next pass; None if they are not kept.
    """

    weights: Mapping[str, Tensor]
    outcome: RecoveryOutcome | None = None
    inputs: LinearInputs | None = None


@torch.no_grad()
def recover_layer(pruned: LayerToRecover, settings: Recovery) -> RecoveredLayer:
    """Recover a layer. Training starts from the refitted weights if the refit lowers the error, else from the pruned ones."""
    refit = settings if isinstance(settings, Refit) else settings.refit
    refitted, inputs = refit_layer(pruned, refit)
    weights: Mapping[str, Tensor] = refitted
    outcome = _outcome(pruned, weights, refit, refit.alpha)
    if isinstance(settings, Train):
        weights = train_layer(pruned, weights if outcome.accepted else {}, settings)
        outcome = _outcome(pruned, weights, refit, TRAINED_ALPHA)
    if not outcome.accepted:
        return RecoveredLayer({}, outcome)
    stored = {
        each.linear.name: _without_new_zeros(each, weights)
        for each in pruned.linears
        if each.linear.name in weights
    }
    return RecoveredLayer(stored, outcome, None if isinstance(settings, Train) else inputs)


def _without_new_zeros(each: PrunedLinear, weights: Mapping[str, Tensor]) -> Tensor:
    """Restore the checkpoint's value of every remaining weight that the dtype of the computation rounded to zero."""
    new = weights[each.linear.name]
    return torch.where((new == 0) & ~each.mask, each.stored.to(new.device), new)


def _outcome(
    pruned: LayerToRecover, weights: Mapping[str, Tensor], settings: Refit, alpha: float
) -> RecoveryOutcome:
    held_out = held_out_windows(settings, len(pruned.hidden_states))
    return RecoveryOutcome(*relative_errors(pruned, [{}, weights], alpha, held_out))
