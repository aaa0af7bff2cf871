"""Which lanes of a search run next: a function of the losses that are known, so that every process finds the same.

A search that died is resumed by replay: what is in the store is looked up again, and the first thing that is not there
is what is to be done.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from layerwise.allocators.allocation import SparsityPlan
from layerwise.allocators.budget import fitted
from layerwise.flows.setting_types import Strategy as Name
from layerwise.flows.settings import OVER_LAYERS, TRIALS, Search
from layerwise.models.skeleton import Linear
from layerwise.strategies.adaptive import AdaptiveSearch
from layerwise.strategies.bayesian import BayesianSearch, require_optuna
from layerwise.strategies.evolutionary import EvolutionarySearch
from layerwise.strategies.projections import ProjectionSearch
from layerwise.strategies.racing import beaten, rounds
from layerwise.strategies.trials import Point, Trial
from layerwise.strategies.two_parameter import TwoParameterSearch
from layerwise.tasks.allocate import AllocateSettings
from layerwise.tasks.results.lane_scores import LaneScore

# Each is a function of the trials so far: see layerwise.strategies.trials.Strategy.
Proposals = AdaptiveSearch | TwoParameterSearch | ProjectionSearch | BayesianSearch | EvolutionarySearch
Known = Mapping[SparsityPlan, Sequence[float]]


@dataclass(frozen=True)
class LaneRequest:
    """Lanes that run next, in as few groups as there is room for.

    Attributes:
        windows: of the selection windows, these (first, and the one after the last); None for all of them.
    """

    plans: tuple[SparsityPlan, ...]
    windows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Strategy:
    """How a search goes through its plans.

    Attributes:
        plans: those of the allocator, the uniform one first: all that may be tried, or what a strategy that makes
            plans itself begins with.
        trials: how many are tried at most, where not all are.
        windows: how many selection windows there are.
        allocation: how sparsities become a plan that meets the budget.
        linears: the prunable ones, by layer.
        stop_after: nothing more is asked for once so many plans are known.
    """

    name: Name
    plans: tuple[SparsityPlan, ...]
    trials: int
    windows: int
    allocation: AllocateSettings
    linears: Sequence[Sequence[Linear]]
    stop_after: int | None = None

    @property
    def most_together(self) -> int:
        """How many lanes are asked for at once at most."""
        if self.name == "projections":
            return self._over_projections().most_together
        if self.name in OVER_LAYERS:
            search = self._over_layers()
            at_once = search.batch if isinstance(search, BayesianSearch) else search.offspring
            return max(at_once, len(self.plans))
        return min(len(self.plans), 4) if self.name in TRIALS else len(self.plans)

    def next_lanes(self, known: Known) -> LaneRequest | None:
        """What is to be known next; None if nothing is.

        Args:
            known: losses of the first selection windows, in nats.
        """
        if self.stop_after is not None and len(known) >= self.stop_after:
            return None
        if self.name == "race":
            return self._race(known)
        if self.name == "adaptive":
            betas = tuple(sorted({plan.beta for plan in self.plans}))
            return self._proposed(AdaptiveSearch(betas, self.trials), self._of_parameters, known)
        if self.name == "two-parameter":
            spreads, offsets = ({plan.beta for plan in self.plans}, {plan.offset for plan in self.plans})
            search = TwoParameterSearch(tuple(sorted(spreads)), tuple(sorted(offsets)), self.trials)
            return self._proposed(search, self._of_parameters, known)
        if self.name == "projections":
            return self._proposed(self._over_projections(), self._of_projections, known)
        if self.name in OVER_LAYERS:
            return self._proposed(self._over_layers(), self._of_layers, known)
        return None if all(plan in known for plan in self.plans) else LaneRequest(self.plans)

    def _race(self, known: Known) -> LaneRequest | None:
        running = list(self.plans)
        for part in rounds(self.windows):
            if any(len(known.get(plan, ())) < part.stop for plan in running):
                whole = len(part) == self.windows
                return LaneRequest(tuple(running), None if whole else (part.start, part.stop))
            # Everybody wants to see the uniform plan beside the best one: no race ends for it.
            out = beaten({plan: known[plan][: part.stop] for plan in running}) - {self.plans[0]}
            running = [plan for plan in running if plan not in out]
        return None

    def _proposed(
        self, search: Proposals, plan_of: Callable[[int, Point], SparsityPlan], known: Known
    ) -> LaneRequest | None:
        done: list[Trial] = []
        while points := _points(search, tuple(done)):
            plans = tuple(plan_of(number, point) for number, point in enumerate(points, len(done)))
            if any(plan not in known for plan in plans):
                return LaneRequest(plans)
            done += [Trial(point, tuple(known[plan])) for point, plan in zip(points, plans, strict=True)]
        return None

    def _of_parameters(self, number: int, point: Point) -> SparsityPlan:
        """The plan of ``(beta,)`` or ``(beta, offset)``."""
        beta, offset = (*point, 0.0)[:2]
        return next(plan for plan in self.plans if (plan.beta, plan.offset) == (beta, offset))

    def _of_layers(self, number: int, point: Point) -> SparsityPlan:
        """The plan with these sparsities, as near as the budget allows; trials have their number for a beta."""
        target, sizes = self.allocation.target, self._layer_sizes
        return self.allocation.plan_of_layers(float(number), fitted(point, sizes, target), sizes)

    def _of_projections(self, number: int, point: Point) -> SparsityPlan:
        """The plan of ``(beta, *offsets)``; trials have their number for a beta."""
        beta, *offsets = point
        (plan,) = (plan for plan in self.plans if plan.beta == beta)
        if not any(offsets):
            return SparsityPlan(float(number), plan.layers)
        kinds = dict(zip(self._shares_of_kinds, offsets, strict=True))
        return self.allocation.plan_of_kinds(float(number), plan, kinds, self.linears)

    @property
    def _layer_sizes(self) -> tuple[int, ...]:
        return tuple(sum(linear.numel for linear in layer) for layer in self.linears)

    @property
    def _shares_of_kinds(self) -> dict[str, float]:
        """The kinds of linears, by their names within a layer, and the part of the prunable weights that each has."""
        numel: dict[str, int] = {}
        for layer in self.linears:
            for linear in layer:
                numel[linear.name] = numel.get(linear.name, 0) + linear.numel
        return {kind: size / sum(numel.values()) for kind, size in numel.items()}

    def _over_projections(self) -> ProjectionSearch:
        betas = tuple(sorted(plan.beta for plan in self.plans))
        return ProjectionSearch(betas, tuple(self._shares_of_kinds.values()), self.trials)

    def _over_layers(self) -> BayesianSearch | EvolutionarySearch:
        sizes = [[linear.numel for linear in layer] for layer in self.linears]
        starts = tuple(plan.by_layer(sizes) for plan in self.plans)
        if self.name == "evolutionary":
            return EvolutionarySearch(self._layer_sizes, starts, self.trials)
        return BayesianSearch(self.allocation.target, starts, budget=self.trials)


@lru_cache(maxsize=1 << 12)
def _points(search: Proposals, trials: tuple[Trial, ...]) -> tuple[Point, ...]:
    """What a search proposes after these trials: a replay asks for it again and again, and Optuna takes its time."""
    return search.propose(trials)


def strategy_of(
    settings: Search, plans: Sequence[SparsityPlan], linears: Sequence[Sequence[Linear]], windows: int
) -> Strategy:
    """How this search goes through its plans.

    Args:
        linears: all of the model, by layer.
        windows: how many selection windows there are.

    Raises:
        ImportError: a Bayesian search, and Optuna is not installed.
    """
    if settings.strategy == "bayesian":
        require_optuna()
    prunable = settings.pruning("auto").prunable(linears)
    trials = settings.trials_of(len(plans))
    return Strategy(
        settings.strategy, tuple(plans), trials, windows, settings.allocation, prunable, settings.stop_after
    )


def first_lanes(
    settings: Search,
    plans: Sequence[SparsityPlan],
    linears: Sequence[Sequence[Linear]],
    windows: int | None,
) -> LaneRequest:
    """What a search begins with, as far as it can be known; ``windows`` is None if nobody has counted them yet."""
    if windows is None and settings.strategy == "race":
        return LaneRequest(tuple(plans))
    request = strategy_of(settings, plans, linears, windows or 0).next_lanes({})
    assert request is not None, "nothing is known yet"
    return request


def follow(
    strategy: Strategy, advance: Callable[[LaneRequest], Sequence[LaneScore] | None]
) -> tuple[list[list[LaneScore]], LaneRequest | None]:
    """Go through the lanes as ``strategy`` has it.

    Args:
        advance: gives the scores of what is requested, in its order; None if it cannot.

    Returns:
        The lanes that were scored, in the order of the strategy's plans, each with one score for every part of the
        windows; and the request that ``advance`` could not answer, None if there was none.
    """
    scores: dict[SparsityPlan, list[LaneScore]] = {}

    def done() -> list[list[LaneScore]]:
        order = {plan: number for number, plan in enumerate(strategy.plans)}
        # Stable: what is none of the allocator's plans comes after them, as it was tried.
        return [scores[plan] for plan in sorted(scores, key=lambda plan: order.get(plan, len(order)))]

    def known() -> dict[SparsityPlan, list[float]]:
        return {plan: [loss for score in parts for loss in score.losses] for plan, parts in scores.items()}

    while request := strategy.next_lanes(known()):
        answer = advance(request)
        if answer is None:
            return done(), request
        for plan, score in zip(request.plans, answer, strict=True):
            scores.setdefault(plan, []).append(score)
    return done(), None
