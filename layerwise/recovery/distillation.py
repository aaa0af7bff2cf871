"""Masked distillation: train the kept weights of a pruned model towards the output of the dense model.

The loss is the Kullback-Leibler divergence from the dense model's distribution of the next token (Hinton et al.,
arXiv:1503.02531). Weights that were pruned stay zero, as in SparseFinetuning (arXiv:2310.06927).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.calibration.counted_tokens import predicting
from layerwise.models.expert_names import expert_linear
from layerwise.scoring.divergence import kl_per_token

# Positions whose logits are in memory at a time: 256 x 128k vocabulary x 4 bytes = 134 MB for each of a few tensors.
LOSS_POSITIONS = 256
BETAS = (
    0.9,
    0.95,
)  # usual for language models; .999 would average over more steps than a short distillation has
LARGEST_NORM = 1.0  # of the gradient; it is usually below, except in the first steps

# Tensors in the state of the optimizer, for each weight.
WEIGHT, MOMENTS = ".kept", ("exp_avg", "exp_avg_sq")

Head = Callable[[Tensor], Tensor]  # from hidden states to logits


def kl_and_gradient(
    head: Head, hidden_states: Tensor, teacher_states: Tensor, counted: Tensor | None = None
) -> tuple[float, Tensor]:
    """Return the mean divergence over the tokens that count, and its gradient with respect to the student's hidden states.

    The logits of ``LOSS_POSITIONS`` positions are in memory at a time.

    Args:
        head: norm and head, the same for both models.
        hidden_states, teacher_states: outputs of the last decoder layer, shape ``(windows, seqlen, hidden_size)``.
        counted: mask of the tokens whose prediction counts, shape ``(windows, seqlen)``; None for all.
    """
    total, gradient = 0.0, torch.empty_like(hidden_states)
    weights = None if counted is None else predicting(counted).to(hidden_states.device)
    tokens = hidden_states.shape[:-1].numel() if weights is None else int(weights.sum())
    for start in range(0, hidden_states.shape[1], LOSS_POSITIONS):
        positions = slice(start, start + LOSS_POSITIONS)
        states = hidden_states[:, positions].detach().requires_grad_()
        with torch.no_grad():
            teacher_logits = head(teacher_states[:, positions])
        divergences = kl_per_token(head(states), teacher_logits)
        if weights is not None:
            divergences = divergences * weights[:, positions]
        loss = divergences.sum() / tokens
        (gradient[:, positions],) = torch.autograd.grad(loss, states)
        total += loss.item()
    return total, gradient


@dataclass(frozen=True)
class WindowLosses:
    """Losses of one window, in nats per token.

    Attributes:
        kl: divergence from the teacher.
        cross_entropy: of the next tokens; its exponential is the perplexity.
    """

    kl: float
    cross_entropy: float


@torch.no_grad()
def window_losses(
    head: Head,
    hidden_states: Tensor,
    teacher_states: Tensor,
    input_ids: Tensor,
    counted: Tensor | None = None,
) -> WindowLosses:
    """Return the losses of one window, without gradients.

    Args:
        head: norm and head, the same for both models.
        hidden_states, teacher_states: outputs of the last decoder layer, shape ``(1, seqlen, hidden_size)``.
        input_ids: shape ``(1, seqlen)``.
        counted: mask of the tokens whose prediction counts, shape ``(1, seqlen)``; None for all.
    """
    kl = cross_entropy = 0.0
    seqlen = input_ids.shape[1]
    weights = None if counted is None else predicting(counted).to(hidden_states.device)
    for start in range(0, seqlen, LOSS_POSITIONS):
        positions = slice(start, start + LOSS_POSITIONS)
        logits = head(hidden_states[:, positions])
        divergences = kl_per_token(logits, head(teacher_states[:, positions]))
        targets = input_ids[0, start + 1 : start + 1 + LOSS_POSITIONS]
        predicted = logits[0, : len(targets)].float()
        if weights is not None:
            some = weights[:, positions]
            divergences = divergences[some]
            predicted, targets = predicted[some[0, : len(targets)]], targets[some[0, : len(targets)]]
        kl += divergences.sum().item()
        cross_entropy += nn.functional.cross_entropy(predicted, targets, reduction="sum").item()
    if weights is None:
        return WindowLosses(kl / seqlen, cross_entropy / (seqlen - 1))
    return WindowLosses(kl / int(weights.sum()), cross_entropy / int(weights[:, :-1].sum()))


def rate_factor(step: int, steps: int, warm_up: float = 0.1) -> float:
    """Return the factor of the learning rate in a step: a linear warm-up, then half a cosine towards 0.

    Args:
        step: number of the step, from 0.
        steps: number of all steps.
        warm_up: fraction of the steps until the full rate.
    """
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class MaskedAdamW:
    """AdamW on the kept weights of pruned linears; all other weights stay exactly zero.

    The step size of each linear is the learning rate times the root mean square of its kept weights at the beginning,
    so one learning rate serves models of all sizes. There is no weight decay.

    Args:
        weights: float32 parameters by name. Their zeros are the pruned weights.
        learning_rate: largest step size, relative to the kept weights.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], learning_rate: float) -> None:
        self.weights = dict(weights)
        self.kept = {name: weight.detach() != 0 for name, weight in self.weights.items()}
        self._rates = {
            name: learning_rate * root_mean_square(weight.detach(), self.kept[name])
            for name, weight in self.weights.items()
        }
        groups = [{"params": [weight], "name": name} for name, weight in self.weights.items()]
        self._optimizer = torch.optim.AdamW(
            groups, lr=learning_rate, betas=BETAS, weight_decay=0.0, fused=True
        )

    @torch.no_grad()
    def step(self, factor: float) -> float:
        """Clip the gradient, change the weights, and clear the gradient.

        Args:
            factor: multiplies the learning rate.

        Returns:
            Norm of the gradient of the kept weights before it was clipped.
        """
        for name, weight in self.weights.items():
            if weight.grad is None:
                assert expert_linear(name) is not None, f"the loss depends on {name}"
                weight.grad = torch.zeros_like(weight)  # some models do not compute an expert without tokens
            weight.grad.mul_(self.kept[name])
        norm = nn.utils.clip_grad_norm_(self.weights.values(), LARGEST_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = factor * self._rates[group["name"]]
        self._optimizer.step()
        self._optimizer.zero_grad()
        # Neither gradient nor moments move a pruned weight from zero. This makes it true of every optimizer.
        for name, weight in self.weights.items():
            weight.mul_(self.kept[name])
        return norm.item()

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Return the kept weights and their moments, each of shape ``(kept,)``, by name of the weight and what it is."""
        state = {}
        for name, weight in self.weights.items():
            moments = self._optimizer.state[weight]
            state[f"{name}{WEIGHT}"] = weight[self.kept[name]]
            for moment in MOMENTS:
                state[f"{name}.{moment}"] = moments[moment][self.kept[name]]
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from the state after ``steps`` steps."""
        for name, weight in self.weights.items():
            kept = self.kept[name]
            weight[kept] = state[f"{name}{WEIGHT}"].to(weight.device)
            self._optimizer.state[weight] = {
                "step": torch.tensor(float(steps), device=weight.device),
                **{
                    moment: torch.zeros_like(weight).masked_scatter_(
                        kept, state[f"{name}.{moment}"].to(weight.device)
                    )
                    for moment in MOMENTS
                },
            }


def root_mean_square(weight: Tensor, kept: Tensor) -> float:
    """Return the root mean square of the kept weights; 0 if there are none."""
    count = int(kept.count_nonzero())
    return math.sqrt(weight.square().sum(dtype=torch.float64).item() / count) if count else 0.0


def in_stored_dtype(trained: Tensor, before: Tensor) -> Tensor:
    """Return trained weights in the dtype of the checkpoint, with exactly its zeros.

    A kept weight that would be rounded to zero, as in float16, keeps its value from before the training.

    Args:
        trained: weights after the training, shape ``(out_features, in_features)``.
        before: weights of the checkpoint, of the same shape.
    """
    stored = trained.to(before.dtype)
    return torch.where((before == 0) | (stored == 0), before, stored)


def window_order(windows: int, count: int, seed: int) -> list[int]:
    """Return the numbers of the windows in the order of the training: all windows shuffled, again and again.

    Args:
        windows: number of windows.
        count: length of the result.
        seed: seed of the random numbers.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    rounds = [torch.randperm(windows, generator=generator) for _ in range(math.ceil(count / windows))]
    return torch.cat(rounds)[:count].tolist()
