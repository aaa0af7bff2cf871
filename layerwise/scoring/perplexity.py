"""Perplexity by the GPTQ/Wanda convention, and the significance of a difference between two plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # both take seconds: too long for a command that only shows a result
    from torch import Tensor

    from layerwise.models.streaming import StreamedModel

# Loss, in nats, of a window whose loss is not finite (a lane can overflow float16, or remove all weights of a layer).
# It is larger than any real loss, and its perplexity is still finite, so such a lane can be compared with others.
DIVERGED = 700.0

# Two-sided 5 % points of Student's t by degrees of freedom. For other degrees, the next lower entry applies.
T_BOUNDS = {
    1: 12.71,
    2: 4.31,
    3: 3.19,
    4: 2.78,
    5: 2.58,
    6: 2.45,
    8: 2.31,
    10: 2.23,
    15: 2.14,
    20: 2.09,
    30: 2.05,
    60: 2.0,
}


def window_losses(
    model: StreamedModel, hidden_states: Tensor, input_ids: Tensor, counted: Tensor | None = None
) -> list[float]:
    """Return the mean cross-entropy of each window, in nats; ``DIVERGED`` where it is not finite.

    Args:
        model: applies its norm and head.
        hidden_states: output of the last layer, shape ``(windows, seqlen, hidden_size)``.
        input_ids: shape ``(windows, seqlen)``.
        counted: mask of the tokens whose prediction counts, same shape; None for all.
    """
    import torch

    losses = [
        model.loss(
            hidden_states[number, None],
            input_ids[number, None],
            None if counted is None else counted[number, None],
        )
        for number in range(len(input_ids))
    ]
    # Read together, because every reading waits for the device.
    return [finite_loss(loss) for loss in torch.stack(losses).cpu().tolist()] if losses else []


def loss_of_tokens(model: StreamedModel, hidden_states: Tensor, input_ids: Tensor, counted: Tensor) -> float:
    """Return the mean cross-entropy of some tokens of all windows together, in nats; ``DIVERGED`` if it is not finite.

    Args:
        model: applies its norm and head.
        hidden_states: output of the last layer, shape ``(windows, seqlen, hidden_size)``.
        input_ids: shape ``(windows, seqlen)``.
        counted: mask of the tokens, same shape. The first token of a window is not predicted. At least one other token.
    """
    tokens = counted[:, 1:].sum(dim=1).tolist()
    total = 0.0
    for number, count in enumerate(tokens):
        if count:
            one = slice(number, number + 1)
            total += count * window_losses(model, hidden_states[one], input_ids[one], counted[one])[0]
    return finite_loss(total / sum(tokens))


def finite_loss(loss: float) -> float:
    """Return ``loss`` (in nats) limited to ``DIVERGED``, which also replaces NaN and infinity."""
    return min(loss, DIVERGED) if math.isfinite(loss) else DIVERGED


def mean_loss(losses: Sequence[float]) -> float:
    """Return the mean over windows of equal length, in nats."""
    return math.fsum(losses) / len(losses)


def perplexity(losses: Sequence[float]) -> float:
    """Return ``exp`` of the mean loss."""
    return math.exp(mean_loss(losses))


def format_perplexity(value: float) -> str:
    """Return a perplexity as text. That of a plan that diverged has up to 300 digits and is written with an exponent."""
    return f"{value:.2f}" if value < 1e6 else f"{value:.1e}"


def rounded_perplexity(value: float) -> float | str:
    """Return a perplexity rounded for a table; "diverged" if the plan diverged."""
    return "diverged" if has_diverged(value) else round(value, 2)


def format_divergence(value: float) -> str:
    """Return a KL divergence as text, in nats."""
    return "diverged" if value >= 0.999 * DIVERGED else f"{value:.4g}"


def has_diverged(perplexity: float) -> bool:
    """Return whether a perplexity belongs to the loss ``DIVERGED``, up to rounding."""
    return math.log(perplexity) >= 0.999 * DIVERGED


@dataclass(frozen=True)
class PairedDifference:
    """Difference between the losses of two plans on the same windows.

    Attributes:
        mean: mean over the windows of (first loss - second loss), in nats; negative if the first plan is better.
        t: mean divided by its standard error; None if undefined (one window, or equal differences).
        windows: number of compared windows.
    """

    mean: float
    t: float | None
    windows: int

    @property
    def significant(self) -> bool:
        """Return whether t exceeds the two-sided 5 % point of Student's t distribution."""
        return self.t is not None and abs(self.t) > self._t_bound

    @property
    def half_interval(self) -> float | None:
        """Return half the width of the 95 % interval around the mean, in nats; None if undefined."""
        return self._t_bound * abs(self.mean / self.t) if self.t else None

    @property
    def _t_bound(self) -> float:
        return T_BOUNDS[max(degrees for degrees in T_BOUNDS if degrees < self.windows)]


def paired_difference(losses: Sequence[float], others: Sequence[float]) -> PairedDifference:
    """Compare two plans window by window (paired t statistic).

    Args:
        losses: losses of the first plan, in nats.
        others: losses of the second plan on the same windows.

    Raises:
        ValueError: the plans were scored on different numbers of windows, or on none.
    """
    if len(losses) != len(others) or not losses:
        raise ValueError(
            f"a paired comparison needs the same windows for both plans; got {len(losses)} and {len(others)} losses. "
            "Score both plans on the same selection windows."
        )
    differences = [loss - other for loss, other in zip(losses, others, strict=True)]
    mean = math.fsum(differences) / len(differences)
    if len(differences) < 2:
        return PairedDifference(mean, None, len(differences))
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    error = math.sqrt(variance / len(differences))
    return PairedDifference(mean, mean / error if error > 0 else None, len(differences))
