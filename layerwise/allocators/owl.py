"""OWL: layers with more outliers among their Wanda scores lose less (arXiv:2310.05175).

A layer's Wanda scores are ``abs(weight)`` times the norm of the input feature, one float32 tensor per linear, of
the dense model. Their common scale, and with it the number of calibration tokens, does not matter.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from layerwise.allocators.budget import by_importance

# What the official README uses with Wanda; the default of the official code is 3.
THRESHOLD = 5.0
# The official default, for 70 %.
SPREAD = 0.08
# Scores that are looked at together, in float64: 32 MB.
PIECE = 1 << 22


@dataclass(frozen=True)
class OWL:
    """Sparsity falls linearly with the percentage of outliers, over a range of ``2 * spread``."""

    threshold: float = THRESHOLD
    spread: float = SPREAD
    method: Literal["owl"] = "owl"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise ValueError(
                f"the outlier threshold of OWL is {self.threshold:g}; it is a positive multiple of the mean score, "
                f"e.g. {THRESHOLD:g}."
            )
        if not 0 <= self.spread <= 1:
            raise ValueError(
                f"the spread of OWL is {self.spread:g}; it must lie in [0, 1], in units of sparsity, e.g. {SPREAD:g}."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Sparsity of every entry, given its ``outlier_percentage``."""
        return owl(scores, sizes, target, self.spread)


def outlier_percentage(scores: Iterable[Tensor], threshold: float = THRESHOLD) -> float:
    """Percentage of one layer's scores that exceed ``threshold`` times their mean.

    Args:
        scores: Wanda scores of every linear of the layer (or of one linear), any shapes. They are gone through
            twice; an iterator is therefore held whole.
        threshold: multiple of the mean over all the scores.

    Raises:
        ValueError: no scores, or infinite or NaN ones.
    """
    pieces = [piece for tensor in scores for piece in tensor.reshape(-1).split(PIECE)]
    count = sum(piece.numel() for piece in pieces)
    if count == 0:
        raise ValueError("OWL got no scores for a layer. Pass the scores of at least one linear.")
    mean = math.fsum(piece.double().sum().item() for piece in pieces) / count
    if not math.isfinite(mean):
        raise ValueError(
            f"the mean of a layer's {count} scores is {mean}. Look for infinite or NaN weights or activations."
        )
    outliers = sum(int((piece.double() > threshold * mean).sum()) for piece in pieces)
    return 100 * outliers / count


def owl(
    outliers: Sequence[float], sizes: Sequence[int], target: float, spread: float = SPREAD
) -> tuple[float, ...]:
    """Sparsities from the percentages of outliers: the more outliers, the less is removed.

    Args:
        outliers: percentage of outliers of every entry, a layer or a linear.
        sizes: number of weights of every entry.
        target: overall sparsity, met exactly by the size-weighted mean.
        spread: lambda; sparsities differ by up to twice this.
    """
    return by_importance(outliers, sizes, target, spread)
