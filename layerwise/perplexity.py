"""Perplexity by the GPTQ/Wanda convention, and how sure a difference between two plans is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from layerwise.streaming import StreamedModel


def window_losses(model: StreamedModel, hidden_states: Tensor, input_ids: Tensor) -> list[float]:
    """Mean cross-entropy of each window, in nats, from the last layer's output.

    Args:
        hidden_states: shape ``(windows, seqlen, hidden_size)``.
        input_ids: shape ``(windows, seqlen)``.
    """
    return [
        model.loss(states, ids)
        for states, ids in zip(hidden_states.split(1), input_ids.split(1), strict=True)
    ]


def perplexity(losses: Sequence[float]) -> float:
    """``exp`` of the mean loss over windows of equal length."""
    return math.exp(math.fsum(losses) / len(losses))


@dataclass(frozen=True)
class PairedDifference:
    """How the loss of one plan differs from another's on the same windows.

    Attributes:
        mean: mean over the windows of (loss - other's loss), in nats; negative if the first is better.
        t: the mean over its standard error; None where it is undefined (one window, or no spread).
    """

    mean: float
    t: float | None

    @property
    def significant(self) -> bool:
        """Beyond two standard errors."""
        return self.t is not None and abs(self.t) > 2


def paired_difference(losses: Sequence[float], others: Sequence[float]) -> PairedDifference:
    """Compare two plans window by window (paired t statistic).

    Raises:
        ValueError: the plans were scored on different numbers of windows.
    """
    if len(losses) != len(others) or not losses:
        raise ValueError(
            f"a paired comparison needs the same windows for both plans; got {len(losses)} and {len(others)} losses. "
            "Score both on the same selection windows."
        )
    differences = [loss - other for loss, other in zip(losses, others, strict=True)]
    mean = math.fsum(differences) / len(differences)
    if len(differences) < 2:
        return PairedDifference(mean, None)
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    error = math.sqrt(variance / len(differences))
    return PairedDifference(mean, mean / error if error > 0 else None)
