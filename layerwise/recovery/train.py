"""Block-wise training: train the remaining weights of a pruned layer towards the dense layer, with fixed masks.

The training starts from the refit. As in EBFT (arXiv:2402.12419), one decoder layer at a time is trained by Adam on the
calibration windows; the input of the layer is that of the pruned model. The loss of a token is ``||e||^2 / ||y||^2``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.calibration.counted_tokens import counted_rows
from layerwise.recovery.pruned_layer import (
    LayerToRecover,
    PrunedLinear,
    held_out_windows,
    relative_errors,
    target_output,
    weight_of,
    weight_of_tokens,
)
from layerwise.recovery.refit import Refit, converted

MOST_EPOCHS = 1000  # guards against a mistyped number that would make a run endless
BETAS = (0.9, 0.95)  # of Adam; the second one is short because a layer is trained for some dozen steps
EVALUATIONS_PER_EPOCH = 2  # on the held-out windows; the best weights are kept
# Share of the dense model's own outputs in the target of the training, which also decides on the best weights. SmolLM2-135M
# at 0.7, beta 0.01, after a refit with alpha 0.25 and at learning rate 0.003: perplexity 223 with 0 and 229 with 0.25,
# which also needs another pass.
TRAINED_ALPHA = 0.0
# Bytes per trained weight: value, gradient and two moments in float32, the converted weight and its gradient.
TRAINED_BYTES = 20


@dataclass(frozen=True)
class Train:
    """Refit the linears of every layer, then train the layer.

    The refit is that of ``Refit``, with the same settings.

    Attributes:
        alpha: share of the dense model's own outputs in the target of the refit, from 0 to 1. The training itself
            always uses the dense layer's output on the pruned model's hidden states.
        steps: number of conjugate-gradient steps of the refit.
        damping: ridge of the refit that pulls towards the pruned weight, as a fraction of the inputs' mean square.
        held_out: share of the calibration windows that is not fitted on. The refit and the training of a layer are used
            only if they lower its error on these windows.
        epochs: number of passes over the other calibration windows.
        learning_rate: size of Adam's steps, as a fraction of the root mean square of a linear's remaining dense weights.
        warm_up: share of the steps in which the learning rate rises to its maximum. It then falls to 0.
        seed: seed of the order of the windows.
    """

    method: Literal["train"] = "train"
    alpha: float = 0.25
    steps: int = 8
    damping: float = 0.01
    held_out: float = 0.125
    epochs: int = 2
    # Of SmolLM2-135M's first six layers at 0.7, the held-out error falls to 0.62 at 0.003, 0.60 at 0.01, and 0.65 at 0.03
    # of its value after pruning (geometric mean); the refit alone reaches 0.70. Perplexity of the model (32 windows of
    # WikiText-2, beta 0.01): 363 pruned, 249 refitted, 223 trained at 0.003, 210 at 0.01.
    learning_rate: float = 0.01
    warm_up: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.refit  # checks its settings
        if not 1 <= self.epochs <= MOST_EPOCHS:
            raise ValueError(f"epochs is {self.epochs}; it must be from 1 to {MOST_EPOCHS}.")
        if not 0 < self.learning_rate < 1:
            raise ValueError(
                f"learning_rate is {self.learning_rate:g}; it must be between 0 and 1. Give a fraction of the weights' "
                "size, e.g. 0.01."
            )
        if not 0 <= self.warm_up < 1:
            raise ValueError(
                f"warm_up is {self.warm_up:g}; it must be 0 or more and less than 1. Give the share of the steps in "
                "which the learning rate rises, e.g. 0.1."
            )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to {(1 << 32) - 1}.")

    @property
    def refit(self) -> Refit:
        """Settings of the refit that the training starts from."""
        return Refit(alpha=self.alpha, steps=self.steps, damping=self.damping, held_out=self.held_out)


@torch.no_grad()
def train_layer(
    pruned: LayerToRecover, weights: Mapping[str, Tensor], settings: Train
) -> Mapping[str, Tensor]:
    """Train the pruned linears of a layer, and keep the weights with the lowest error on the held-out windows.

    The weights are trained in float32 and converted to the model's dtype for every pass. Each window is one step. Its
    target is computed when it is needed, because the targets of all windows take as much memory as the hidden states.
    Memory in addition to the layer: its dense and its new weights, 20 bytes per trained weight (values, gradients, two
    moments, and the converted weights with their gradients), and the activations of one window.

    Args:
        weights: weights to start from, by linear; empty for the pruned weights.

    Returns:
        New weights by linear, in the checkpoint's dtype and in the orientation of the module's weight, zero exactly
        where the pruned weights are; ``weights`` if no others have a lower error.
    """
    held_out = held_out_windows(settings, len(pruned.hidden_states))
    windows = len(pruned.hidden_states) - held_out
    trained = [_TrainedLinear(each, _start(pruned, weights, each)) for each in pruned.linears]
    parameters = [each.weight for each in trained]
    optimizer = torch.optim.Adam(
        [{"params": [each.weight], "lr": settings.learning_rate * each.scale} for each in trained],
        betas=BETAS,
        fused=True,  # without temporary tensors
    )
    steps = settings.epochs * windows
    # Set by hand: a schedule of torch and its optimizer refer to each other, so their memory would be freed late.
    largest_rates = [group["lr"] for group in optimizer.param_groups]
    evaluations = settings.epochs * EVALUATIONS_PER_EPOCH
    evaluated = {round(steps * number / evaluations) for number in range(1, evaluations + 1)}
    best = weights
    (least,) = relative_errors(pruned, [weights], TRAINED_ALPHA, held_out)
    for step, window in enumerate(_order(pruned.index, windows, settings), 1):
        states, dense_states = (
            every[window : window + 1] for every in (pruned.hidden_states, pruned.dense_states)
        )
        counted = pruned.counted_in(slice(window, window + 1))
        target = counted_rows(target_output(pruned, states, dense_states, TRAINED_ALPHA), counted)
        with torch.enable_grad():
            error = counted_rows(_output(pruned, trained, states).float(), counted) - target
            # The sum over the tokens and not their mean, whose gradients may vanish in float16. Adam ignores the factor.
            loss = (error.square().sum(dim=-1) * weight_of_tokens(target)).sum()
        # Some layers do not use all of their linears: materialize_grads.
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for each, gradient in zip(trained, gradients, strict=True):
            # Adam does not move a weight whose gradient is always 0, so removed weights stay exactly zero.
            each.weight.grad = gradient.masked_fill_(each.mask, 0)
        for group, largest in zip(optimizer.param_groups, largest_rates, strict=True):
            group["lr"] = largest * learning_rate_share(step - 1, steps, settings.warm_up)
        optimizer.step()
        optimizer.zero_grad()
        if step in evaluated:
            found = {each.linear.name: each.result() for each in trained}
            (reached,) = relative_errors(pruned, [found], TRAINED_ALPHA, held_out)
            if reached < least:
                best, least = found, reached
    return best


def learning_rate_share(step: int, steps: int, warm_up: float) -> float:
    """Return the learning rate of a step, counted from 0, as a share of its maximum.

    It rises linearly in the first ``warm_up * steps`` steps, then falls to 0 along a cosine.
    """
    rising = warm_up * steps
    if step < rising:
        return min(1.0, (step + 1) / rising)
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


class _TrainedLinear:
    """A linear and its weight in float32.

    Args:
        pruned: the linear.
        start: first value of the weight.
    """

    def __init__(self, pruned: PrunedLinear, start: Tensor) -> None:
        self.linear, self.mask, self.dtype = pruned.linear, pruned.mask, pruned.dtype
        self.weight = start.to(torch.float32, copy=True).requires_grad_()
        kept = pruned.dense.float().masked_fill(pruned.mask, 0)
        self.scale = math.sqrt(float(kept.square().sum()) / max(1, int((~pruned.mask).sum())))

    def result(self) -> Tensor:
        """Return a copy of the weight in the checkpoint's dtype."""
        return converted(self.weight.detach(), self.dtype)


def _start(pruned: LayerToRecover, weights: Mapping[str, Tensor], each: PrunedLinear) -> Tensor:
    name = each.linear.name
    return weights[name].to(pruned.model.device) if name in weights else weight_of(pruned.layer, name)


def _order(index: int, windows: int, settings: Train) -> list[int]:
    """Return the windows of all epochs in the order of the steps, random in every epoch.

    It depends on the seed and on the layer alone, and on no device.
    """
    generator = torch.Generator().manual_seed((settings.seed << 16) + index)
    return [
        window
        for _ in range(settings.epochs)
        for window in torch.randperm(windows, generator=generator).tolist()
    ]


def _output(pruned: LayerToRecover, trained: list[_TrainedLinear], hidden_states: Tensor) -> Tensor:
    """Return the output of the layer with the trained weights, in a form that can be differentiated."""
    weights = {each.linear.weight_name: each.weight.to(pruned.model.dtype) for each in trained}

    def layer(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(pruned.layer, weights, args, kwargs)

    return pruned.model.run_layer_with_gradients(pruned.index, layer, hidden_states)
