"""Racing: stop scoring plans that can no longer win (after the Hoeffding races of Maron and Moore, NIPS 1993)."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from layerwise.scoring.perplexity import DIVERGED, mean_loss, paired_difference

# A lane that is as good as the best loses 8 windows in a row with probability 1/256, and reaches t > 4 on them with 1/400.
SIGN_WINDOWS = 8
# Far above the usual bound of 2, because lanes are compared several times, and with the luckiest lane.
T_BOUND = 4.0
KEPT = 2  # number of lanes with the lowest mean that are never beaten
# On fewer than 8 windows, certain differences are rare, and a round would be wasted.
FIRST_ROUND = 8

Name = TypeVar("Name", bound=Hashable)


def beaten(losses: Mapping[Name, Sequence[float]]) -> set[Name]:
    """Return the lanes to stop: those that are certainly worse than the best lane. The best two are always kept.

    One of three criteria suffices; each detects cases that the others miss:

    * The paired difference to the best lane has a t above ``T_BOUND``, or is the same positive number on several windows.
    * The lane is worse than the best on each of 8 or more windows. The losses of a very bad lane vary so much between
      windows that its t stays small.
    * The lane diverged on more windows than the best. One window of 700 nats makes t about 1, whatever the other
      losses are, and later windows cannot compensate for it.

    Args:
        losses: losses on the same windows for every lane, in nats.

    Raises:
        ValueError: lanes have different numbers of windows, or none.
    """
    if len({len(of_lane) for of_lane in losses.values()}) > 1 or not all(losses.values()):
        raise ValueError(
            "every lane of a race needs losses on the same windows, at least one, but the numbers of losses are "
            f"{ {name: len(of_lane) for name, of_lane in losses.items()} }. Cut them to the windows of all lanes."
        )
    ranking = sorted(losses, key=lambda name: mean_loss(losses[name]))  # stable for equal means
    return {name for name in ranking[KEPT:] if _hopeless(losses[name], losses[ranking[0]])}


def _hopeless(losses: Sequence[float], best: Sequence[float]) -> bool:
    if _diverged(losses) > _diverged(best):
        return True
    if len(losses) >= SIGN_WINDOWS and all(loss > other for loss, other in zip(losses, best, strict=True)):
        return True
    difference = paired_difference(losses, best)
    if difference.t is None:
        return difference.windows > 1 and difference.mean > 0
    return difference.t > T_BOUND


def _diverged(losses: Sequence[float]) -> int:
    return sum(loss >= DIVERGED for loss in losses)


def rounds(windows: int) -> tuple[range, ...]:
    """Split the selection windows into rounds; beaten lanes stop after each round.

    Every round at least doubles the number of scored windows: 8, 8, 16, 32, ... The last round includes the remainder
    that is too short for another doubling, because it would save less than a read of the model costs. Each round
    reads the model once more: ``log2(windows / 8) + 1`` reads, instead of ``windows / 8`` for rounds of equal length. A lane is scored on at most twice the windows needed to recognize it as beaten (four times in the last
    round). This is optimal if that number is unknown.

    Args:
        windows: number of selection windows.

    Returns:
        Consecutive ranges that cover ``range(windows)``.

    Raises:
        ValueError: ``windows`` is below 1.
    """
    if windows < 1:
        raise ValueError(f"{windows} windows cannot be split into rounds. Use at least 1 selection window.")
    bounds = [0, min(FIRST_ROUND, windows)]
    while 2 * bounds[-1] <= windows:
        bounds.append(2 * bounds[-1])
    bounds[-1] = windows
    return tuple(range(start, end) for start, end in zip(bounds, bounds[1:], strict=False))
