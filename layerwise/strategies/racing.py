"""Racing: stop scoring the plans that can no longer win (after Maron and Moore's Hoeffding races, NIPS 1993)."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from layerwise.scoring.perplexity import DIVERGED, mean_loss, paired_difference

# An equal lane loses so many windows in a row with probability 1 / 256, and gets a t above 4 on them with 1 / 400.
SIGN_WINDOWS = 8

Name = TypeVar("Name", bound=Hashable)


def beaten(losses: Mapping[Name, Sequence[float]], t: float = 4.0, keep: int = 2) -> set[Name]:
    """The lanes that are given up: those that are worse than the best one beyond doubt.

    Any of three reasons is enough, as each sees what the others miss:

    * the paired difference to the best has a t above ``t``, or is the same positive number on several windows;
    * it is worse than the best on every one of 8 windows or more: a lane that falls apart differs so much
      between windows that its t stays small;
    * it diverged on more windows than the best: one window of 700 nats makes t about 1, whatever the others are,
      and no later window makes up for it.

    Args:
        losses: of the same windows for every lane, in nats; include the best lane of earlier groups, if any.
        t: far above the usual bound of 2, as lanes are compared several times and with the luckiest one.
        keep: so many lanes of the lowest mean are never beaten.

    Raises:
        ValueError: lanes with different numbers of windows, or with none; a ``keep`` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, but a race needs a winner. Keep at least 1 lane.")
    if len({len(of_lane) for of_lane in losses.values()}) > 1 or not all(losses.values()):
        raise ValueError(
            "lanes race over the same windows, but these are the numbers of losses by lane: "
            f"{ {name: len(of_lane) for name, of_lane in losses.items()} }. Cut them to the windows all have seen."
        )
    ranking = sorted(losses, key=lambda name: mean_loss(losses[name]))  # stable: of equal ones the first
    return {name for name in ranking[keep:] if _hopeless(losses[name], losses[ranking[0]], t)}


def _hopeless(losses: Sequence[float], best: Sequence[float], t: float) -> bool:
    if _diverged(losses) > _diverged(best):
        return True
    if len(losses) >= SIGN_WINDOWS and all(loss > other for loss, other in zip(losses, best, strict=True)):
        return True
    difference = paired_difference(losses, best)
    if difference.t is None:
        return difference.windows > 1 and difference.mean > 0
    return difference.t > t


def _diverged(losses: Sequence[float]) -> int:
    return sum(loss >= DIVERGED for loss in losses)


def rounds(windows: int, first: int = 8) -> tuple[range, ...]:
    """The selection windows in the order they are scored: after each round, the beaten lanes stop.

    Every round at least doubles the windows seen so far: 8, 8, 16, 32, ..., and the last one takes in what would not.
    Each round costs one more read of the model. Rounds of equal length read it ``windows / first`` times; doubling
    ones ``log2(windows / first) + 1`` times, and no lane is scored on more than twice the windows that were needed
    to see it beaten (four times, in the last round), the best that is possible without knowing how many these are.
    A remainder shorter than that is no round of its own, as it could save less than the read of it costs.

    Args:
        windows: how many there are.
        first: length of the first round. On fewer than 8 windows a difference that is beyond doubt is rare, and
            the reads would be for nothing.

    Returns:
        Consecutive ranges that cover ``range(windows)``.

    Raises:
        ValueError: no windows, or an empty first round.
    """
    if windows < 1 or first < 1:
        raise ValueError(
            f"{windows} windows cannot be scored in rounds that begin with {first}. Both must be at least 1."
        )
    bounds = [0, min(first, windows)]
    while 2 * bounds[-1] <= windows:
        bounds.append(2 * bounds[-1])
    bounds[-1] = windows
    return tuple(range(start, end) for start, end in zip(bounds, bounds[1:], strict=False))
