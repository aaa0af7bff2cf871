"""Recovery of one pruned decoder layer, given the hidden states that reach it in the pruned and in the dense model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.models.hidden_states import batches
from layerwise.models.skeleton import Linear
from layerwise.models.streaming import StreamedModel
from layerwise.recovery.refit import REFITTED_ENTRIES, MixedMoments, Refit, refitted

Recovery = Refit


def held_out_windows(settings: Recovery, windows: int) -> int:
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


def recovery_bytes(settings: Recovery, linears: Sequence[Linear], itemsize: int) -> int:
    """Return the memory of the recovery of one layer, in addition to the layer and the hidden states.

    Args:
        linears: linears of the layer.
        itemsize: bytes per weight in the dtype of the computation.
    """
    weights = sum(linear.numel for linear in linears) * (2 * itemsize + 1)  # dense, recovered, masks
    widest = max(linear.in_features for linear in linears)
    return weights + 3 * 4 * widest**2 + 5 * 4 * min(REFITTED_ENTRIES, max(each.numel for each in linears))


@dataclass(frozen=True)
class RecoveryOutcome:
    """Error of a layer on the held-out calibration windows: mean over the tokens of ``||e||^2 / ||y||^2``.

    ``y`` mixes the dense layer's outputs on the pruned and on the dense model's hidden states, as the target of the
    refit does, and ``e`` is the difference of the layer's output from it.

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
class PrunedLinear:
    """A pruned linear of the layer to recover; all tensors in the orientation of the module's weight.

    Attributes:
        dense: weight before pruning, in the dtype of the computation.
        mask: ``True`` where the pruned weight is zero.
        dtype: dtype of the checkpoint; recovered weights have it.
    """

    linear: Linear
    dense: Tensor
    mask: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class LayerToRecover:
    """A pruned decoder layer, and the calibration windows that reach it.

    Attributes:
        model: runs the layer.
        index: index of the layer.
        layer: the layer, with its pruned weights; they are the same after the recovery.
        linears: linears that lost weights.
        hidden_states: input of the layer in the pruned model, shape ``(windows, seqlen, hidden_size)``.
        dense_states: input of the layer in the dense model, same shape.
    """

    model: StreamedModel
    index: int
    layer: nn.Module
    linears: Sequence[PrunedLinear]
    hidden_states: Tensor
    dense_states: Tensor

    def run(self, hidden_states: Tensor) -> Tensor:
        """Return the layer's output with its current weights."""
        return self.model.run_layer(self.index, self.layer, hidden_states)

    @property
    def dense_weights(self) -> dict[str, Tensor]:
        """Weights before pruning, by linear."""
        return {each.linear.name: each.dense for each in self.linears}


@torch.no_grad()
def recover_layer(pruned: LayerToRecover, settings: Recovery) -> tuple[dict[str, Tensor], RecoveryOutcome]:
    """Recover a layer.

    Returns:
        New weights by linear, in the checkpoint's dtype and in the orientation of the module's weight, zero exactly
        where the pruned weights are; and the errors that decide whether to use them.
    """
    weights = refit_layer(pruned, settings)
    held_out = held_out_windows(settings, len(pruned.hidden_states))
    before = relative_error(pruned, {}, settings.alpha, held_out)
    after = relative_error(pruned, weights, settings.alpha, held_out)
    return weights, RecoveryOutcome(before, after)


def refit_layer(pruned: LayerToRecover, settings: Refit) -> dict[str, Tensor]:
    """Refit the linears of a layer in the order of the data flow, each on inputs that the refitted ones before it give.

    Linears that share their input are refitted together. Memory in addition to the layer: its dense and its new
    weights, and two float32 matrices of the inputs of one linear, and three while it is refitted.
    """
    weights: dict[str, Tensor] = {}
    windows = len(pruned.hidden_states) - held_out_windows(settings, len(pruned.hidden_states))
    by_name = {each.linear.name: each for each in pruned.linears}
    for names in linears_by_input(pruned):
        moments = MixedMoments.empty(
            by_name[names[0]].linear.in_features, settings.alpha, pruned.model.device
        )
        for states, dense_states in zip(
            batches(pruned.hidden_states[:windows]), batches(pruned.dense_states[:windows]), strict=True
        ):
            dense_inputs = None
            if settings.alpha:
                with weights_replaced(pruned.layer, pruned.dense_weights):
                    dense_inputs = _inputs_of(pruned, names[0], dense_states)
            with weights_replaced(pruned.layer, weights):
                moments.add(_inputs_of(pruned, names[0], states), dense_inputs)
        prepared = moments.prepare(settings.damping)
        for name in names:
            each = by_name[name]
            oriented = each.linear.oriented
            current = _weight(pruned.layer, name).to(each.dtype)
            fitted = refitted(
                oriented(each.dense), oriented(current), oriented(each.mask), prepared, settings.steps
            )
            weights[name] = oriented(fitted).contiguous()
    return weights


def relative_error(
    pruned: LayerToRecover, weights: Mapping[str, Tensor], alpha: float, held_out: int
) -> float:
    """Return the error of a layer on its last ``held_out`` windows, see ``RecoveryOutcome``.

    Args:
        weights: weights that replace the pruned ones, by linear.
    """
    total = torch.zeros((), dtype=torch.float64, device=pruned.model.device)
    tokens = 0
    for states, dense_states in zip(
        batches(pruned.hidden_states[-held_out:]), batches(pruned.dense_states[-held_out:]), strict=True
    ):
        with weights_replaced(pruned.layer, pruned.dense_weights):
            target = pruned.run(states).float()
            if alpha:
                target = torch.lerp(target, pruned.run(dense_states).float(), alpha)
        with weights_replaced(pruned.layer, weights):
            error = pruned.run(states).float() - target
        total += (error.square().sum(dim=-1) / target.square().sum(dim=-1)).sum(dtype=torch.float64)
        tokens += states.shape[0] * states.shape[1]
    return float(total) / tokens


@contextmanager
def weights_replaced(layer: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the weights of some linears, given by name, within the block; converted to the module's dtype."""
    parameters = {name: _weight(layer, name) for name in weights}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


class _Reached(Exception):
    """The wanted linear was called, so the rest of the layer need not be computed."""


def _inputs_of(pruned: LayerToRecover, name: str, hidden_states: Tensor) -> Tensor:
    """Return the input of one linear for these hidden states."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _Reached

    hook = pruned.layer.get_submodule(name).register_forward_pre_hook(catch)
    try:
        pruned.run(hidden_states)
    except _Reached:
        pass
    finally:
        hook.remove()
    return caught[0]


def linears_by_input(pruned: LayerToRecover) -> list[list[str]]:
    """Group the linears to recover by their input tensor, in the order in which the layer calls them.

    Raises:
        ValueError: the layer calls a linear twice, so that it has no single input.
    """
    groups: list[tuple[Tensor, int, list[str]]] = []  # keeps the tensors, so that no id is used twice

    def watch(name: str) -> object:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tensor = inputs[0]
            if any(name in names for _, _, names in groups):
                raise ValueError(
                    f"layer {pruned.index} calls {name} twice in one pass, so it has no single input to be refitted "
                    f"on. Exclude it (--exclude '{name}'), or search without recovery."
                )
            for other, version, names in groups:
                if other is tensor and version == tensor._version:
                    names.append(name)
                    return
            groups.append((tensor, tensor._version, [name]))

        return pruned.layer.get_submodule(name).register_forward_pre_hook(note)

    hooks = [watch(each.linear.name) for each in pruned.linears]
    try:
        pruned.run(pruned.hidden_states[:1])
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]
    return [names for _, _, names in groups]


def _weight(layer: nn.Module, name: str) -> Tensor:
    return layer.get_submodule(name).weight  # type: ignore[return-value]
