"""Adaptive search: find the minimum of a U-shaped loss over one parameter, with about six trials.

Brackets the minimum and narrows the bracket by parabolas, or by bisection where a parabola does not help (R. P. Brent,
Algorithms for Minimization without Derivatives, 1973, chapter 5), on a grid of candidates instead of the real line.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerwise.strategies.trials import Point, Trial, losses_by_index


@dataclass(frozen=True)
class AdaptiveSearch:
    """Search over betas that tries only a few of the candidates.

    The search ends when both neighbours of the best beta have been tried, or when the budget is spent. If the loss falls
    and then rises, tried neighbours prove that the beta is the best of all.

    Attributes:
        candidates: ascending betas, starting with 0 (uniform), which is always tried as a safeguard.
        budget: maximum number of trials, including uniform. With 7 to 15 candidates, smooth curves usually took 5
            trials, and at most 8.
    """

    candidates: tuple[float, ...]
    budget: int = 6

    def __post_init__(self) -> None:
        check_ascending(self.candidates, "candidates")
        if self.candidates[0] != 0:
            raise ValueError(
                f"the first candidate is {self.candidates[0]:g}; it must be 0, the uniform plan, which "
                "is always tried. Insert 0 as the first candidate."
            )
        check_budget(self.budget)

    def propose(self, trials: Sequence[Trial]) -> tuple[Point, ...]:
        """Return the next points to try, each ``(beta,)``; see ``trials.Strategy``."""
        losses = losses_by_index(trials, [(candidate,) for candidate in self.candidates])
        left = max(self.budget - len(trials), 0)
        return tuple((self.candidates[index],) for index in next_indices(self.candidates, losses)[:left])


def check_ascending(candidates: Sequence[float], what: str) -> None:
    """Raise if candidates are missing, not finite, or not strictly ascending."""
    ascending = all(low < high for low, high in zip(candidates, candidates[1:], strict=False))
    if not candidates or not ascending or not all(map(math.isfinite, candidates)):
        raise ValueError(
            f"the {what} are {tuple(candidates)}; they must be finite, strictly ascending, and at least one. Sort them "
            "and remove duplicates."
        )


def check_budget(budget: int) -> None:
    """Raise if the budget does not allow a trial."""
    if budget < 1:
        raise ValueError(f"the budget is {budget} trials; it must be at least 1, for the uniform plan.")


def next_indices(candidates: Sequence[float], losses: Mapping[int, float]) -> tuple[int, ...]:
    """Return the indices of the next candidates to try, the most promising first; ``()`` if the best is known.

    The first candidates are at 0, a quarter and half of the range. The second half of the legal range of betas is
    usually far beyond the minimum (perplexity 3662 instead of 42 at the end), so it is tried only if the loss still
    falls there. For the same reason, a step is at most half of the remaining range.

    Args:
        candidates: candidates in ascending order.
        losses: losses of the candidates tried so far, by index. Of equal losses, the lowest index is the best.
    """
    last = len(candidates) - 1
    if not losses:
        return tuple(sorted({0, min(max(last // 4, 1), last), min(max(last // 2, 2), last)}))
    tried = sorted(losses)
    best = min(tried, key=lambda index: losses[index])
    place = tried.index(best)
    open_left, open_right = 0 < best == tried[0], last > best == tried[-1]
    low = best // 2 if open_left else tried[max(place - 1, 0)]
    high = (best + last + 1) // 2 if open_right else tried[min(place + 1, len(tried) - 1)]
    if open_left and open_right:
        return (best - 1, best + 1)
    if not open_left and not open_right and max(best - low, high - best) < 2:
        return ()
    bottom = _bottom(candidates, losses, tried[max(min(place - 1, len(tried) - 3), 0) :][:3])
    if bottom is not None:
        by_distance = sorted(range(low, high + 1), key=lambda index: abs(candidates[index] - bottom))
        if by_distance[0] not in losses:
            return (by_distance[0],)
        if by_distance[0] == best:
            # Try both neighbours at once: they usually end the search, and one read of the model serves both.
            return tuple(index for index in by_distance if abs(index - best) == 1 and index not in losses)
    if open_left or open_right:
        return (high if open_right else low,)
    return ((low + best) // 2 if best - low > high - best else (best + high) // 2,)


def _bottom(candidates: Sequence[float], losses: Mapping[int, float], triple: Sequence[int]) -> float | None:
    """Return the minimum of the parabola through three trials; None for fewer trials, or if it opens downwards."""
    if len(triple) < 3:
        return None
    (low, low_loss), (middle, middle_loss), (high, high_loss) = ((candidates[i], losses[i]) for i in triple)
    first_slope = (middle_loss - low_loss) / (middle - low)
    second_slope = (high_loss - middle_loss) / (high - middle)
    curvature = (second_slope - first_slope) / (high - low)
    if not curvature > 0:
        return None
    bottom = (low + middle) / 2 - first_slope / (2 * curvature)
    return bottom if math.isfinite(bottom) else None
