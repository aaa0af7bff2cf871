"""OWL: remove less from layers with more outliers among their Wanda scores (arXiv:2310.05175).

The Wanda scores of a layer are ``abs(weight)`` times the norm of the input feature in the dense model, one float32
tensor per linear. Scaling all scores, for instance by the number of calibration tokens, does not change the result.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from layerwise.allocators.budget import by_importance

# Value in the official README for Wanda; the default of the official code is 3.
THRESHOLD = 5.0
# Default of the official code, for 70 %.
SPREAD = 0.08
# Scores that are processed at a time, in float64: 32 MB.
PIECE = 1 << 22


@dataclass(frozen=True)
class OWL:
    """Decrease sparsity linearly with the percentage of outliers, over a range of ``2 * spread``."""

    threshold: float = THRESHOLD
    spread: float = SPREAD
    method: Literal["owl"] = "owl"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise ValueError(
                f"the outlier threshold of OWL is {self.threshold:g}; it must be positive and finite. Give a multiple "
                f"of the mean score, e.g. {THRESHOLD:g}."
            )
        if not 0 <= self.spread <= 1:
            raise ValueError(
                f"the spread of OWL is {self.spread:g}; it must lie in [0, 1]. Give a sparsity, e.g. {SPREAD:g}."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every entry from its ``outlier_percentage``."""
        return owl(scores, sizes, target, self.spread)


def outlier_percentage(scores: Iterable[Tensor], threshold: float = THRESHOLD) -> float:
    """Return the percentage of a layer's scores that exceed ``threshold`` times their mean.

    Args:
        scores: Wanda scores of every linear of the layer (or of one linear), any shapes. They are read twice, so an
            iterator is held in memory as a whole.
        threshold: multiple of the mean over all scores.

    Raises:
        ValueError: there are no scores, or a score is infinite or NaN.
    """
    pieces = [piece for tensor in scores for piece in tensor.reshape(-1).split(PIECE)]
    count = sum(piece.numel() for piece in pieces)
    if count == 0:
        raise ValueError("OWL got no scores for a layer. Pass the scores of at least one linear.")
    mean = math.fsum(piece.double().sum().item() for piece in pieces) / count
    if not math.isfinite(mean):
        raise ValueError(
            f"the mean of the {count} scores of a layer is {mean}. Look for infinite or NaN weights or activations."
        )
    outliers = sum(int((piece.double() > threshold * mean).sum()) for piece in pieces)
    return 100 * outliers / count


def owl(
    outliers: Sequence[float], sizes: Sequence[int], target: float, spread: float = SPREAD
) -> tuple[float, ...]:
    """Compute sparsities from percentages of outliers: more outliers give a lower sparsity.

    Args:
        outliers: percentage of outliers of every entry (a layer or a linear).
        sizes: number of weights of every entry.
        target: overall sparsity; the size-weighted mean equals it.
        spread: lambda; half the largest difference between two sparsities.
    """
    return by_importance(outliers, sizes, target, spread)
