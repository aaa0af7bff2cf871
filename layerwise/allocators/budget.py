"""Sparsities that meet the overall target exactly, whatever the scores and the sizes they come from.

An entry is whatever gets a sparsity of its own: a decoder layer, or a linear; its size is its number of weights.
"""

import math
from collections.abc import Sequence

# Size-weighted means are met this closely: of 10**9 weights, a thousandth of one.
TOLERANCE = 1e-12
# A bracket a few units wide, halved as often, is far narrower than the 1e-16 between floats near 1.
BISECTIONS = 100


def fitted(
    sparsities: Sequence[float],
    sizes: Sequence[int],
    target: float,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> tuple[float, ...]:
    """Shift all sparsities by one common amount, clipping what leaves the bounds, until their mean is the target.

    Of all sparsities within the bounds with this mean these are the closest ones, in squares weighted by size. A
    constant added to all the sparsities changes nothing. Sparsities that are within the bounds and have the
    mean already come back as they are, bit for bit; equal ones come back as exactly ``target``.

    Args:
        sparsities: what the entries should get if there were neither bounds nor budget; any finite numbers.
        sizes: number of weights of every entry.
        target: size-weighted mean of the result, met to 1e-12.
        lowest: no entry gets less than this.
        highest: no entry gets more than this.

    Raises:
        ValueError: no entries, other sparsities than sizes, a size below 1, a sparsity that is not finite, a
            target outside of the bounds, or sparsities too far apart for the precision of floats.
    """
    if not lowest <= target <= highest:
        raise ValueError(
            f"an overall sparsity of {target:g} cannot be met by sparsities within [{lowest:g}, {highest:g}]. "
            "Move the target or widen the bounds."
        )
    _check_finite(sparsities, "sparsity")
    mean = weighted_mean(sparsities, sizes)
    smallest, largest = min(sparsities), max(sparsities)
    if smallest == largest:
        return (float(target),) * len(sizes)
    within = lowest <= smallest and largest <= highest
    if within and abs(mean - target) <= TOLERANCE:
        return tuple(sparsities)

    def clipped(shift: float) -> tuple[float, ...]:
        return tuple(min(max(sparsity + shift, lowest), highest) for sparsity in sparsities)

    too_little, enough = lowest - largest, highest - smallest
    for _ in range(BISECTIONS):
        middle = (too_little + enough) / 2
        if weighted_mean(clipped(middle), sizes) < target:
            too_little = middle
        else:
            enough = middle
    result = clipped(enough)
    if abs(weighted_mean(result, sizes) - target) > TOLERANCE:
        raise ValueError(
            f"sparsities between {smallest:g} and {largest:g} are too far apart to be shifted to a mean of "
            f"{target:g} within 1e-12. Lower the spread of the allocation."
        )
    return result


def weighted_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Mean of the entries' values, every weight counting once.

    Raises:
        ValueError: no entries, other values than sizes, or a size below 1.
    """
    if not sizes or len(values) != len(sizes) or min(sizes) < 1:
        raise ValueError(
            f"{len(values)} values do not go with entries of sizes {list(sizes)}: every entry, a layer or a linear, "
            "needs one value and at least one weight."
        )
    return math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def min_max(scores: Sequence[float]) -> tuple[float, ...]:
    """Scores mapped linearly so that the smallest becomes 0 and the largest 1.

    Equal scores all become 0: they tell the entries apart by nothing, and every allocator turns equal values
    into the uniform plan.

    Raises:
        ValueError: a score that is not finite.
    """
    _check_finite(scores, "score")
    smallest, largest = min(scores, default=0.0), max(scores, default=0.0)
    if smallest == largest:
        return (0.0,) * len(scores)
    return tuple((score - smallest) / (largest - smallest) for score in scores)


def by_importance(
    importances: Sequence[float], sizes: Sequence[int], target: float, spread: float
) -> tuple[float, ...]:
    """The map that OWL, DSA, DLP and LSA share: the more important an entry, the less it loses.

    With ``u`` the importances scaled to [0, 1], an entry gets ``target - 2 spread (u - mean(u))``, fitted to the
    bounds and the exact budget (see ``fitted``; the published codes take the plain mean and do neither).

    Args:
        importances: any finite scale; only their relative distances count.
        sizes: number of weights of every entry.
        target: overall sparsity.
        spread: the least and the most important entry differ by twice this much sparsity, unless clipped.
    """
    scaled = min_max(importances)
    mean = weighted_mean(scaled, sizes)
    return fitted([target - 2 * spread * (value - mean) for value in scaled], sizes, target)


def _check_finite(values: Sequence[float], what: str) -> None:
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(
                f"the {what} of entry {index} is {value}, which is no finite number. Look for infinite or NaN "
                "weights or activations in that layer, or use an allocator that does not measure it."
            )
