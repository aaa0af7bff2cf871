"""Search over the kinds of linears: beta first, then how much more or less each kind of projection loses.

Query, key, value, output, gate, up and down projections differ in how much they bear, and attention as a whole hides
it: on SmolLM2 queries can lose more while keys and values have to lose less. EvoPress (arXiv:2410.14649) goes on to a
sparsity for every linear; one number for each kind needs tens of trials, not thousands.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from layerwise.strategies.adaptive import check_ascending, check_budget, next_indices
from layerwise.strategies.trials import Point, Trial, comparable_losses

BETA_TRIALS = 6  # of a first search along beta alone, as ``AdaptiveSearch`` has by default
STEPS = (0.5, 1.0, 1.5, 2.5)  # how far the kind that moves furthest goes, in distances of the probes
# Nats above the round's beginning: what a probe loses beyond that tells a side, and no slope (a lane that failed).
WORST = 1.0


@dataclass(frozen=True)
class ProjectionSearch:
    """Goes down the slope that trials on both sides of the best point measure, as far as the best of some steps.

    A round tries every kind's offset a little higher and a little lower, all in one group of lanes, and the betas
    beside the best one if they are not known. Then it tries steps of several lengths down the slope. The next
    round begins at the best of these points; when none is better than the round's beginning, or the budget has no room
    for a whole round, it ends. All points of the search along beta alone stay candidates, uniform among them.

    Attributes:
        betas: ascending, the first one 0 (uniform), which is always tried.
        shares: of every kind, its part of the prunable weights; they add up to 1.
        budget: at most so many trials.
        probe: how far offsets are moved to measure the slope; half of it from the second round on.
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
                f"the first beta is {self.betas[0]:g}; it must be 0, the uniform plan, which is always tried. Put 0 in "
                "front."
            )
        if len(self.shares) < 2 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(
                f"the kinds of linears have the shares {self.shares} of the weights; at least two are needed, all "
                "positive, with the sum 1. Use the strategy adaptive for one kind of linear, or exclude fewer linears."
            )
        if self.budget < self.least:
            raise ValueError(
                f"the budget is {self.budget} trials. With {len(self.shares)} kinds of linears one round takes "
                f"{self._round}, after those of {len(self.betas)} betas: give at least {self.least}, or use the "
                "strategy adaptive, which tries betas only."
            )
        if not 0 < self.probe < 0.5:
            raise ValueError(
                f"offsets are probed at a distance of {self.probe:g}; it must lie in (0, 0.5), e.g. 0.05."
            )

    @property
    def most_together(self) -> int:
        """How many points are proposed at once at most: the probes of a round."""
        return 2 * len(self.shares) + min(2, len(self.betas) - 1)

    @property
    def _round(self) -> int:
        return self.most_together + len(STEPS)

    @property
    def least(self) -> int:
        """How many trials the search along beta and one round may take."""
        return min(BETA_TRIALS, len(self.betas)) + self._round

    def propose(self, trials: Sequence[Trial]) -> tuple[Point, ...]:
        """See ``trials.Strategy``; a point is ``(beta, *offsets)``, an offset for each kind.

        Offsets are relative: what all of them have in common is nothing to the caller, who meets the budget.
        """
        losses = dict(zip((trial.point for trial in trials), comparable_losses(trials), strict=True))
        zeros = (0.0,) * len(self.shares)
        first = takewhile(lambda point: point[1:] == zeros, losses)  # a round begins with offsets
        along = {self.betas.index(point[0]): losses[point] for point in first}
        room = BETA_TRIALS - len(along)
        if room > 0 and (indices := next_indices(self.betas, along)[:room]):
            return tuple((self.betas[index], *zeros) for index in indices)
        best = min(along, key=lambda index: (along[index], index))
        return self._rounds((self.betas[best], *zeros), losses)

    def _rounds(self, start: Point, losses: Mapping[Point, float]) -> tuple[Point, ...]:
        """Go through the rounds from ``start`` on; the first points that were not tried."""
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
        """From ``start``, or the better one of the betas beside it, down the slope; none where there is no slope.

        Args:
            losses: of the points of this round.
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
    """The point with another offset of one kind."""
    offsets = list(point)
    offsets[1 + kind] += distance
    return tuple(offsets)


def _untried(points: Sequence[Point], losses: Mapping[Point, float]) -> tuple[Point, ...]:
    return tuple(point for point in points if point not in losses)
