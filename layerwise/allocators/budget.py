"""Fitting sparsities to the overall target exactly.

An entry is a decoder layer or a linear. Its size is its number of weights.
"""

import math
from collections.abc import Sequence

# Allowed error of size-weighted means: a thousandth of one weight for 10**9 weights.
TOLERANCE = 1e-12
# Halving an interval a few units wide this often makes it far narrower than 1e-16, the spacing of floats near 1.
BISECTIONS = 100


def fitted(sparsities: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
    """Shift all sparsities by a common amount and clip them to [0, 1], so that their mean is the target.

    Among all sparsities within [0, 1] and with this mean, the result is the closest to ``sparsities`` in
    size-weighted squares. Adding a constant to all sparsities does not change the result. Sparsities that already
    have this mean and are within [0, 1] are returned bit for bit. Equal sparsities become exactly ``target``.

    Args:
        sparsities: desired sparsities, without regard to [0, 1] and target; any finite numbers.
        sizes: number of weights of every entry.
        target: size-weighted mean of the result, met to 1e-12.

    Raises:
        ValueError: there are no entries, the numbers of sparsities and sizes differ, a size is below 1, a sparsity is
            not finite, the target is outside [0, 1], or the sparsities are too far apart for the precision of
            floats.
    """
    if not 0 <= target <= 1:
        raise ValueError(
            f"the overall sparsity is {target:g}; it must lie in [0, 1]. Give the fraction of weights to remove."
        )
    _check_finite(sparsities, "sparsity")
    mean = weighted_mean(sparsities, sizes)
    smallest, largest = min(sparsities), max(sparsities)
    if smallest == largest:
        return (float(target),) * len(sizes)
    if smallest >= 0 and largest <= 1 and abs(mean - target) <= TOLERANCE:
        return tuple(sparsities)

    def clipped(shift: float) -> tuple[float, ...]:
        return tuple(min(max(sparsity + shift, 0.0), 1.0) for sparsity in sparsities)

    too_little, enough = 0.0 - largest, 1.0 - smallest
    for _ in range(BISECTIONS):
        middle = (too_little + enough) / 2
        if weighted_mean(clipped(middle), sizes) < target:
            too_little = middle
        else:
            enough = middle
    result = clipped(enough)
    if abs(weighted_mean(result, sizes) - target) > TOLERANCE:
        raise ValueError(
            f"sparsities from {smallest:g} to {largest:g} are too far apart to be shifted to a mean of {target:g} "
            "within 1e-12. Reduce the spread of the allocation."
        )
    return result


def between(
    sparsities: Sequence[float], sizes: Sequence[int], target: float, strength: float
) -> tuple[float, ...]:
    """Return the sparsities that lie at the fraction ``strength`` of the way from the uniform plan to ``sparsities``.

    Args:
        sparsities: a plan without a strength of its own.
        sizes: number of weights of every entry.
        target: overall sparsity, met exactly (see ``fitted``).
        strength: 0 gives the uniform plan, 1 the given one.
    """
    return fitted([target + strength * (sparsity - target) for sparsity in sparsities], sizes, target)


def check_strength(method: str, strength: float) -> None:
    """Refuse a strength outside [0, 1].

    Raises:
        ValueError: the message names the method.
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"the strength of {method} is {strength:g}; it must lie in [0, 1]. Use 1 for the method as published, or a "
            "smaller one for a plan between it and uniform."
        )


def weighted_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the mean of ``values``, weighted by ``sizes``.

    Raises:
        ValueError: there are no entries, the numbers of values and sizes differ, or a size is below 1.
    """
    if not sizes or len(values) != len(sizes) or min(sizes) < 1:
        raise ValueError(
            f"{len(values)} values do not match entries of sizes {list(sizes)}. Pass one value for every entry (a "
            "layer or a linear); every entry needs at least one weight."
        )
    return math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def min_max(scores: Sequence[float]) -> tuple[float, ...]:
    """Scale scores linearly so that the smallest becomes 0 and the largest 1.

    If all scores are equal, all become 0; every allocator turns equal values into the uniform plan.

    Raises:
        ValueError: a score is not finite.
    """
    _check_finite(scores, "score")
    smallest, largest = min(scores, default=0.0), max(scores, default=0.0)
    if smallest == largest:
        return (0.0,) * len(scores)
    return tuple((score - smallest) / (largest - smallest) for score in scores)


def by_importance(
    importances: Sequence[float], sizes: Sequence[int], target: float, spread: float
) -> tuple[float, ...]:
    """Map importances to sparsities, as OWL, DSA, DLP and LSA do: a more important entry gets a lower sparsity.

    With ``u`` the importances scaled to [0, 1], an entry gets ``target - 2 spread (u - mean(u))``, fitted to the
    bounds and to the exact target (see ``fitted``). The published codes take the unweighted mean and do not fit.

    Args:
        importances: any finite numbers; only their relative distances matter.
        sizes: number of weights of every entry.
        target: overall sparsity.
        spread: half the difference between the sparsities of the least and the most important entry, unless clipped.
    """
    scaled = min_max(importances)
    mean = weighted_mean(scaled, sizes)
    return fitted([target - 2 * spread * (value - mean) for value in scaled], sizes, target)


def _check_finite(values: Sequence[float], what: str) -> None:
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(
                f"the {what} of entry {index} is {value}; it must be finite. Look for infinite or NaN weights or "
                "activations in that layer, or use an allocator that does not measure them."
            )
