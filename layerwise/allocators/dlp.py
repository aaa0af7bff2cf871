"""DLP: layers whose typical Wanda score is larger lose more (ICML 2025, Dynamic Layerwise Pruning).

A layer's Wanda scores are ``abs(weight)`` times the norm of the input feature, one float32 tensor per linear, of the
dense model. All layers must have seen the same tokens: the scores of layers are compared with each other.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.allocators.budget import by_importance

# Published for 70 %.
ALPHA = 0.15
# Scores that are looked at together: 32 MB in float64 or int64.
PIECE = 1 << 22
# Upper half of the bits of a float32; the bits of floats that are not negative are ordered as the floats are.
UPPER_BITS = 16


@dataclass(frozen=True)
class DLP:
    """Sparsity rises linearly with the layer's median (the paper) or mean (the code), over ``2 * alpha``."""

    alpha: float = ALPHA
    statistic: Literal["median", "mean"] = "median"
    method: Literal["dlp"] = "dlp"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha of DLP is {self.alpha:g}; it must lie in [0, 1], in units of sparsity, e.g. {ALPHA:g}."
            )

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Sparsity of every entry, given its ``typical_score``."""
        return dlp(scores, sizes, target, self.alpha)


def typical_score(scores: Iterable[Tensor], statistic: Literal["median", "mean"] = "median") -> float:
    """Median or mean of one layer's scores, all of its linears together.

    The median is exact and, of an even number, the lower of the two in the middle. It is found without sorting or
    copying the layer: by counting the upper halves of the floats' bits, then the lower halves of those that share
    the median's upper half.

    Args:
        scores: Wanda scores of every linear of the layer (or of one linear), any shapes, 0 or more, float32 or
            narrower. They are gone through several times; an iterator is therefore held whole.
        statistic: "median" as in the paper, "mean" as in the official code.

    Raises:
        ValueError: no scores, or negative, infinite or NaN ones; another statistic.
    """
    pieces = [piece for tensor in scores for piece in tensor.reshape(-1).split(PIECE) if piece.numel()]
    count = sum(piece.numel() for piece in pieces)
    if count == 0:
        raise ValueError("DLP got no scores for a layer. Pass the scores of at least one linear.")
    if not all(bool(((piece >= 0) & piece.isfinite()).all()) for piece in pieces):
        raise ValueError(
            f"some of a layer's {count} scores are negative, infinite or NaN; Wanda scores are finite, 0 or more. "
            "Look for infinite or NaN weights or activations."
        )
    if statistic == "mean":
        return math.fsum(piece.double().sum().item() for piece in pieces) / count
    if statistic == "median":
        return _lower_median(pieces, count)
    raise ValueError(f"DLP knows no statistic {statistic!r}; it is 'median' or 'mean'.")


def dlp(
    scores: Sequence[float], sizes: Sequence[int], target: float, alpha: float = ALPHA
) -> tuple[float, ...]:
    """Sparsities from the typical scores: the larger, the more is removed.

    The paper takes the importance ``1 - score / sum of the scores``, scaled to [0, 2 alpha]; since importance is linear
    in the score, the normalisation by the sum drops out.

    Args:
        scores: ``typical_score`` of every entry, a layer or a linear.
        sizes: number of weights of every entry.
        target: overall sparsity, met exactly by the size-weighted mean.
        alpha: sparsities differ by up to twice this.
    """
    return by_importance([-score for score in scores], sizes, target, alpha)


def _lower_median(pieces: Sequence[Tensor], count: int) -> float:
    upper, rank = _bin_of_rank((_bits(piece) >> UPPER_BITS for piece in pieces), (count - 1) // 2)
    sharing = (bits[bits >> UPPER_BITS == upper] for bits in map(_bits, pieces))
    lower, _ = _bin_of_rank((bits & ((1 << UPPER_BITS) - 1) for bits in sharing), rank)
    return torch.tensor((upper << UPPER_BITS) | lower, dtype=torch.int32).view(torch.float32).item()


def _bits(piece: Tensor) -> Tensor:
    """Bits of the scores as float32; abs() makes -0.0 the same as 0.0."""
    return piece.float().abs().view(torch.int32)


def _bin_of_rank(values: Iterable[Tensor], rank: int) -> tuple[int, int]:
    """The value that comes at ``rank`` when all are sorted, and its rank among the ones equal to it."""
    counts = sum(value.bincount(minlength=1 << UPPER_BITS).cpu() for value in values)
    assert isinstance(counts, Tensor), "the pieces are not empty"
    below = counts.cumsum(0)
    found = int((below <= rank).sum())
    return found, rank - int(below[found] - counts[found])
