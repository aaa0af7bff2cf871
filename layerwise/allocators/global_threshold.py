"""Global: remove the weights with the lowest scores of the whole model, by one threshold over all layers.

A threshold over a model that does not fit into memory is found exactly in two passes over the scores. The bits of
float32 scores from 0 on are ordered as the scores are: the first pass counts the upper half of the bits, the second pass
the lower half of the scores whose upper half is that of the threshold.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.allocators.budget import between, check_strength

UPPER = 1 << 15  # values of the upper 16 bits of a score: the bit of the sign is 0
LOWER = 1 << 16  # values of the lower 16 bits
FIRST_INFINITE = 0x7F80  # upper half of infinity; those of NaN are above it
# Scores that are counted at a time; limits the temporary integers.
PIECE = 1 << 22


@dataclass(frozen=True)
class Global:
    """Give every entry the fraction of its weights whose scores are below the threshold of the whole model.

    Scores are those of the pruner: absolute weights for magnitude. Wanda, and pruners that do not score weights one by
    one (sparsegpt, alps) or begin with another pruner's mask (wanda_swaps, dsnot), use Wanda's: absolute weights times the
    norm of the input over all calibration tokens.

    Attributes:
        strength: 1 for the threshold's plan; smaller values lie between it and uniform.
    """

    strength: float = 1.0
    method: Literal["global"] = "global"

    def __post_init__(self) -> None:
        check_strength(self.method, self.strength)

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every entry from its fraction of weights below the threshold for ``target``."""
        return between(scores, sizes, target, self.strength)


def count_upper(scores: Iterable[Tensor]) -> Tensor:
    """Count the scores by the upper half of their bits: the first pass.

    Args:
        scores: float32, 0 or larger, any shapes.

    Returns:
        Shape ``(UPPER,)``, int64, on the CPU.

    Raises:
        ValueError: a score is negative, infinite or NaN.
    """
    counts = torch.zeros(UPPER, dtype=torch.int64)
    for bits in _bits(scores):
        if len(bits) and not 0 <= int(bits.min()) <= int(bits.max()) < FIRST_INFINITE << 16:
            raise ValueError(
                "a score of a weight is negative, infinite or NaN, so weights cannot be compared over the layers. Look for "
                "infinite or NaN weights or activations, or use an allocator that does not measure the model."
            )
        counts += torch.bincount(bits >> 16, minlength=UPPER).cpu()
    return counts


def threshold_bin(counts: Tensor, target: float) -> int:
    """Return the upper half of the bits of the score below which the fraction ``target`` of all scores lies.

    Args:
        counts: sum of ``count_upper`` over the whole model.
    """
    return _first_reaching(counts, math.ceil(target * int(counts.sum())))


def count_lower(scores: Iterable[Tensor], upper: int) -> tuple[int, Tensor]:
    """Count the scores below the bin ``upper``, and those within it by the lower half of their bits: the second pass.

    Args:
        scores: as for ``count_upper``.
        upper: result of ``threshold_bin``.

    Returns:
        The number below, and counts of shape ``(LOWER,)``, int64, on the CPU.
    """
    below, within = 0, torch.zeros(LOWER, dtype=torch.int64)
    for bits in _bits(scores):
        halves = bits >> 16
        below += int((halves < upper).sum())
        within += torch.bincount(bits[halves == upper] & (LOWER - 1), minlength=LOWER).cpu()
    return below, within


def fractions_below(
    below: Sequence[int], within: Tensor, sizes: Sequence[int], target: float
) -> tuple[float, ...]:
    """Return the fraction of every entry's weights that the threshold removes; their weighted mean is ``target``.

    Weights whose scores equal the threshold are removed in the same proportion from every entry. In bfloat16, thousands
    of weights are equal; removing the first ones would favour the last layers.

    Args:
        below: by entry, the number of scores below the threshold's bin.
        within: by entry, counts within the bin, shape ``(entries, LOWER)``.
        sizes: number of weights of every entry.
        target: fraction of all weights to remove, above 0.
    """
    removed = target * sum(sizes)
    last = _first_reaching(within.sum(dim=0), math.ceil(removed) - sum(below))
    certain = within[:, :last].sum(dim=1).tolist()
    equal = within[:, last].tolist()
    share = (removed - sum(below) - sum(certain)) / sum(equal)
    return tuple(
        (low + more + share * ties) / size
        for low, more, ties, size in zip(below, certain, equal, sizes, strict=True)
    )


def _bits(scores: Iterable[Tensor]) -> Iterable[Tensor]:
    for tensor in scores:
        for piece in tensor.contiguous().view(-1).split(PIECE):
            yield piece.view(torch.int32)


def _first_reaching(counts: Tensor, wanted: int) -> int:
    """Return the first index at which the cumulative count reaches ``wanted``, which is at least 1.

    ``wanted`` is an integer because torch compares integers with a float in float32.
    """
    return int((counts.cumsum(0) >= wanted).int().argmax())
