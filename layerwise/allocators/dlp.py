"""DLP: remove more from layers whose typical Wanda score is larger (ICML 2025, Dynamic Layerwise Pruning).

The Wanda scores of a layer are ``abs(weight)`` times the norm of the input feature in the dense model, one float32
tensor per linear. Scores are compared across layers, so all layers must have seen the same tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.allocators.budget import by_importance

# Published value for 70 %.
ALPHA = 0.15
# Scores that are processed at a time: 32 MB in float64 or int64.
PIECE = 1 << 22
# Upper half of the bits of a float32. The bit patterns of nonnegative floats have the same order as the floats.
UPPER_BITS = 16


@dataclass(frozen=True)
class DLP:
    """Increase sparsity linearly with the median (paper) or mean (official code) score, over a range of ``2 * alpha``."""

    alpha: float = ALPHA
    statistic: Literal["median", "mean"] = "median"
    method: Literal["dlp"] = "dlp"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha of DLP is {self.alpha:g}; it must lie in [0, 1]. Give a sparsity, e.g. {ALPHA:g}."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every entry from its ``typical_score``."""
        return dlp(scores, sizes, target, self.alpha)


def typical_score(scores: Iterable[Tensor], statistic: Literal["median", "mean"] = "median") -> float:
    """Return the median or mean of all scores of a layer.

    The median is exact; for an even number of scores it is the lower of the two middle ones. It is found without
    sorting or copying the layer: the upper halves of the bit patterns are counted first, then the lower halves of the
    scores that share the median's upper half.

    Args:
        scores: Wanda scores of every linear of the layer (or of one linear), any shapes, 0 or more, float32 or
            narrower. They are read several times, so an iterator is held in memory as a whole.
        statistic: "median" as in the paper, "mean" as in the official code.

    Raises:
        ValueError: there are no scores, a score is negative, infinite or NaN, or ``statistic`` is unknown.
    """
    pieces = [piece for tensor in scores for piece in tensor.reshape(-1).split(PIECE) if piece.numel()]
    count = sum(piece.numel() for piece in pieces)
    if count == 0:
        raise ValueError("DLP got no scores for a layer. Pass the scores of at least one linear.")
    if not all(bool(((piece >= 0) & piece.isfinite()).all()) for piece in pieces):
        raise ValueError(
            f"some of the {count} scores of a layer are negative, infinite or NaN; Wanda scores are finite and 0 or "
            "more. Look for infinite or NaN weights or activations."
        )
    if statistic == "mean":
        return math.fsum(piece.double().sum().item() for piece in pieces) / count
    if statistic == "median":
        return _lower_median(pieces, count)
    raise ValueError(f"DLP has no statistic {statistic!r}; use 'median' or 'mean'.")


def dlp(
    scores: Sequence[float], sizes: Sequence[int], target: float, alpha: float = ALPHA
) -> tuple[float, ...]:
    """Compute sparsities from typical scores: a larger score gives a higher sparsity.

    The paper uses the importance ``1 - score / sum of the scores``, scaled to [0, 2 alpha]. Importance is linear in the
    score, so the division by the sum has no effect.

    Args:
        scores: ``typical_score`` of every entry (a layer or a linear).
        sizes: number of weights of every entry.
        target: overall sparsity; the size-weighted mean equals it.
        alpha: half the largest difference between two sparsities.
    """
    return by_importance([-score for score in scores], sizes, target, alpha)


def _lower_median(pieces: Sequence[Tensor], count: int) -> float:
    upper, rank = _bin_of_rank((_bits(piece) >> UPPER_BITS for piece in pieces), (count - 1) // 2)
    sharing = (bits[bits >> UPPER_BITS == upper] for bits in map(_bits, pieces))
    lower, _ = _bin_of_rank((bits & ((1 << UPPER_BITS) - 1) for bits in sharing), rank)
    return torch.tensor((upper << UPPER_BITS) | lower, dtype=torch.int32).view(torch.float32).item()


def _bits(piece: Tensor) -> Tensor:
    """Return the bit patterns of the scores in float32; abs() turns -0.0 into 0.0."""
    return piece.float().abs().view(torch.int32)


def _bin_of_rank(values: Iterable[Tensor], rank: int) -> tuple[int, int]:
    """Return the value at index ``rank`` of the sorted values, and its rank among the values equal to it."""
    counts = sum(value.bincount(minlength=1 << UPPER_BITS).cpu() for value in values)
    assert isinstance(counts, Tensor), "the pieces are not empty"
    below = counts.cumsum(0)
    found = int((below <= rank).sum())
    return found, rank - int(below[found] - counts[found])
