"""Projection search: beta first, then an offset for each kind of projection (query, key, value, output, gate, ...).

The kinds tolerate different sparsities, also within attention: on SmolLM2, queries tolerate a higher sparsity, and keys
and values need a lower one. EvoPress (arXiv:2410.14649) searches a sparsity for every linear. One number for each kind
needs tens of trials instead of thousands.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from layerwise.strategies.adaptive import check_ascending, check_budget, next_indices
from layerwise.strategies.trials import Point, Trial, comparable_losses

BETA_TRIALS = 6  # maximum number of trials of the first search along beta, the default of ``AdaptiveSearch``
STEPS = (0.5, 1.0, 1.5, 2.5)  # step lengths of the kind with the largest move, in units of ``probe``
# Limit, in nats above the start of a round, of the losses that slopes are computed from. A larger loss (of a lane that
# failed) gives the direction of the slope, but not its size.
WORST = 1.0


@dataclass(frozen=True)
class ProjectionSearch:
    """Gradient descent over the offsets, with slopes measured by trials on both sides of the best point.

    A round tries a slightly higher and a slightly lower offset for every kind, all in one lane group, and the betas
    next to the best one if they are untried. Then it tries steps of several lengths down the slope. The next round
    starts at the best of these points. The search ends when none is better than the start of the round, or when the
    budget does not allow another whole round. All points of the search along beta remain candidates, including uniform.

    Attributes:
        betas: ascending betas, starting with 0 (uniform), which is always tried.
        shares: fraction of the prunable weights in every kind; they add up to 1.
        budget: maximum number of trials.
        probe: change of an offset to measure the slope; half as much in each later round.
    """

    betas: tuple[float, ...]
    shares: tuple[float, ...]
    budget: int
    probe: float = 0.05

    def __post_init__(self) -> None:
        check_ascending(self.betas, "betas")
        check_budget(self.budget)
        if self.betas[0] != 0:
            raise ValueError(
                f"the first beta is {self.betas[0]:g}; it must be 0, the uniform plan, which is always tried. Insert 0 "
                "as the first beta."
            )
        if len(self.shares) < 2 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(
                f"the kinds of linears have the shares {self.shares} of the weights; at least two are needed, all "
                "positive, with the sum 1. Use the strategy adaptive for one kind, or exclude fewer linears."
            )
        if self.budget < self.least:
            raise ValueError(
                f"the budget is {self.budget} trials, but with {len(self.shares)} kinds of linears one round takes "
                f"{self._round}, in addition to the search over {len(self.betas)} betas. Give at least {self.least}, "
                "or use the strategy adaptive, which tries betas only."
            )
        if not 0 < self.probe < 0.5:
            raise ValueError(
                f"the probe distance of the offsets is {self.probe:g}; it must lie in (0, 0.5), e.g. 0.05."
            )

    @property
    def most_together(self) -> int:
        """Return the maximum number of points in a proposal: the probes of a round."""
        return 2 * len(self.shares) + min(2, len(self.betas) - 1)

    @property
    def _round(self) -> int:
        return self.most_together + len(STEPS)

    @property
    def least(self) -> int:
        """Return the maximum number of trials of the search along beta and one round."""
        return min(BETA_TRIALS, len(self.betas)) + self._round

    def propose(self, trials: Sequence[Trial]) -> tuple[Point, ...]:
        """Return the next points to try, each ``(beta, *offsets)`` with an offset for each kind; see ``trials.Strategy``.

        Offsets are relative: adding a constant to all of them does not change the plan, because the caller fits the
        overall sparsity.
        """
        losses = dict(zip((trial.point for trial in trials), comparable_losses(trials), strict=True))
        zeros = (0.0,) * len(self.shares)
        first = takewhile(lambda point: point[1:] == zeros, losses)  # the first nonzero offset starts a round
        along = {self.betas.index(point[0]): losses[point] for point in first}
        room = BETA_TRIALS - len(along)
        if room > 0 and (indices := next_indices(self.betas, along)[:room]):
            return tuple((self.betas[index], *zeros) for index in indices)
        best = min(along, key=lambda index: (along[index], index))
        return self._rounds((self.betas[best], *zeros), losses)

    def _rounds(self, start: Point, losses: Mapping[Point, float]) -> tuple[Point, ...]:
        """Replay the rounds from ``start``; return the first untried points."""
        probe = self.probe
        while True:
            probes = self._probes(start, probe)
            if untried := _untried(probes, losses):
                return untried if len(untried) + len(STEPS) <= self.budget - len(losses) else ()
            steps = self._steps(start, probe, {point: losses[point] for point in (start, *probes)})
            if untried := _untried(steps, losses):
                return untried
            best = min((start, *probes, *steps), key=lambda point: losses[point])
            if best == start:
                return ()
            start, probe = best, self.probe / 2

    def _probes(self, start: Point, probe: float) -> list[Point]:
        kinds = range(len(self.shares))
        sides = [_moved(start, kind, side) for kind in kinds for side in (probe, -probe)]
        place = self.betas.index(start[0])
        beside = [*self.betas[max(place - 1, 0) : place], *self.betas[place + 1 : place + 2]]
        return sides + [(beta, *start[1:]) for beta in beside]

    def _steps(self, start: Point, probe: float, losses: Mapping[Point, float]) -> list[Point]:
        """Return steps down the slope, with the best beta of the round; no steps if the slope is 0.

        Args:
            start: first point of the round.
            probe: distance of the probes.
            losses: losses of the points of this round.
        """

        def seen(kind: int, distance: float) -> float:
            return min(losses[_moved(start, kind, distance)], losses[start] + WORST)

        down = [seen(kind, -probe) - seen(kind, probe) for kind in range(len(self.shares))]
        common = math.fsum(each * share for each, share in zip(down, self.shares, strict=True))
        furthest = max(abs(each - common) for each in down)
        if furthest == 0:
            return []
        unit = [(each - common) / furthest for each in down]
        beta = min((point for point in losses if point[1:] == start[1:]), key=lambda point: losses[point])[0]
        return [
            (beta, *(offset + length * probe * each for offset, each in zip(start[1:], unit, strict=True)))
            for length in STEPS
        ]


def _moved(point: Point, kind: int, distance: float) -> Point:
    """Return the point with the offset of one kind changed by ``distance``."""
    offsets = list(point)
    offsets[1 + kind] += distance
    return tuple(offsets)


def _untried(points: Sequence[Point], losses: Mapping[Point, float]) -> tuple[Point, ...]:
    return tuple(point for point in points if point not in losses)
