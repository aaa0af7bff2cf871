"""Which lanes of a search run next: a function of the losses that are known, so that every process finds the same.

A search that died is resumed by replay: what is in the store is looked up again, and the first thing that is not there
is what is to be done.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flows.fields import Strategy as Name
from flows.settings import TRIALS, Search
from layerwise.adaptive_search import AdaptiveSearch
from layerwise.allocation import SparsityPlan
from layerwise.racing import beaten, rounds
from layerwise.trials import Strategy as Proposals
from layerwise.trials import Trial
from layerwise.two_parameter_search import TwoParameterSearch
from tasks.branch import LaneScore

# Number of the uniform plan: everybody wants to see it beside the best one, so no race ends for it.
UNIFORM = 0


@dataclass(frozen=True)
class LaneRequest:
    """Lanes that run next, in as few groups as there is room for.

    Attributes:
        plans: numbers of their plans.
        windows: of the selection windows, these (first, and the one after the last); None for all of them.
    """

    plans: tuple[int, ...]
    windows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Strategy:
    """How a search goes through its betas.

    Attributes:
        points: beta and offset of its plans, the uniform one first.
        trials: how many of them are tried at most, where not all are.
        windows: how many selection windows there are.
    """

    name: Name
    points: tuple[tuple[float, float], ...]
    trials: int
    windows: int

    def next_lanes(self, known: Mapping[int, Sequence[float]]) -> LaneRequest | None:
        """What is to be known next; None if nothing is.

        Args:
            known: losses of the first selection windows, in nats, by the number of the plan.
        """
        if self.name == "race":
            return self._race(known)
        if self.name == "adaptive":
            betas = tuple(sorted({beta for beta, _ in self.points}))
            return self._proposed(AdaptiveSearch(betas, self.trials), known)
        if self.name == "two-parameter":
            betas, offsets = (tuple(sorted(set(values))) for values in zip(*self.points, strict=True))
            return self._proposed(TwoParameterSearch(betas, offsets, self.trials), known)
        everything = tuple(range(len(self.points)))
        return None if all(plan in known for plan in everything) else LaneRequest(everything)

    def _race(self, known: Mapping[int, Sequence[float]]) -> LaneRequest | None:
        running = list(range(len(self.points)))
        for part in rounds(self.windows):
            if any(len(known.get(plan, ())) < part.stop for plan in running):
                whole = len(part) == self.windows
                return LaneRequest(tuple(running), None if whole else (part.start, part.stop))
            out = beaten({plan: known[plan][: part.stop] for plan in running}) - {UNIFORM}
            running = [plan for plan in running if plan not in out]
        return None

    def _proposed(self, search: Proposals, known: Mapping[int, Sequence[float]]) -> LaneRequest | None:
        done: list[Trial] = []
        while points := search.propose(done):
            plans = tuple(self.points.index((point + (0.0,))[:2]) for point in points)
            if any(plan not in known for plan in plans):
                return LaneRequest(plans)
            done += [Trial(point, tuple(known[plan])) for point, plan in zip(points, plans, strict=True)]
        return None


def strategy_of(settings: Search, plans: Sequence[SparsityPlan], windows: int) -> Strategy:
    """How this search goes through its plans; ``windows`` is how many selection windows it has."""
    points = tuple((plan.beta, plan.offset) for plan in plans)
    trials = settings.trials or TRIALS.get(settings.strategy, len(points))
    return Strategy(settings.strategy, points, trials, windows)


def first_lanes(settings: Search, plans: Sequence[SparsityPlan], windows: int | None) -> LaneRequest:
    """What a search begins with, as far as it can be known; ``windows`` is None if nobody has counted them yet."""
    if windows is None and settings.strategy == "race":
        return LaneRequest(tuple(range(len(plans))))
    request = strategy_of(settings, plans, windows or 0).next_lanes({})
    assert request is not None, "nothing is known yet"
    return request


def follow(
    strategy: Strategy, advance: Callable[[LaneRequest], Sequence[LaneScore] | None]
) -> tuple[list[list[LaneScore]], LaneRequest | None]:
    """Go through the lanes as ``strategy`` has it.

    Args:
        advance: gives the scores of what is requested, in its order; None if it cannot.

    Returns:
        The lanes that were scored, by the number of their plan, each with one score for every part of the windows; and
        the request that ``advance`` could not answer, None if there was none.
    """
    scores: dict[int, list[LaneScore]] = {}

    def done() -> list[list[LaneScore]]:
        return [scores[plan] for plan in sorted(scores)]

    def known() -> dict[int, list[float]]:
        return {plan: [loss for score in parts for loss in score.losses] for plan, parts in scores.items()}

    while request := strategy.next_lanes(known()):
        answer = advance(request)
        if answer is None:
            return done(), request
        for plan, score in zip(request.plans, answer, strict=True):
            scores.setdefault(plan, []).append(score)
    return done(), None
