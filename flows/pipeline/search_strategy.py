"""Search strategy: the plans that are tried next, as a function of the losses known so far.

The function is deterministic, so every process that works on a search finds the same next plans. A search that was
interrupted is replayed: losses that are in the store are looked up, and the first missing one is computed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from layerwise.allocators.budget import fitted
from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.flows.setting_types import StrategyName
from layerwise.flows.settings import OVER_LAYERS, TRIALS, Search
from layerwise.models.expert_names import kind_of
from layerwise.models.skeleton import Linear
from layerwise.scoring.perplexity import mean_loss, paired_difference
from layerwise.strategies.adaptive import AdaptiveSearch
from layerwise.strategies.bayesian import BayesianSearch, require_optuna
from layerwise.strategies.evolutionary import EvolutionarySearch
from layerwise.strategies.projections import ProjectionSearch
from layerwise.strategies.racing import FIRST_ROUND, beaten, rounds
from layerwise.strategies.trials import Point, Trial
from layerwise.strategies.two_parameter import TwoParameterSearch
from layerwise.tasks.allocate import AllocateSettings

FINALISTS = 2  # plans that the strategy auto scores on all windows, in addition to uniform
# A third plan is scored too if its paired t to the best is at most this. At 50 %, where the curve is flat, the first windows do not
# tell the best plans apart.
T_OF_FINALISTS = 1.0
# Each implements the protocol layerwise.strategies.trials.Strategy.
Proposals = AdaptiveSearch | TwoParameterSearch | ProjectionSearch | BayesianSearch | EvolutionarySearch
KnownLosses = Mapping[SparsityPlan, Sequence[float]]


@dataclass(frozen=True)
class LaneRequest:
    """Lanes that run next, in as few groups as fit.

    Attributes:
        windows: range of the selection windows that they are scored on (first, and one past the last); None for all.
    """

    plans: tuple[SparsityPlan, ...]
    windows: tuple[int, int] | None = None

    @property
    def continues(self) -> bool:
        """Whether the plans were scored on earlier windows before."""
        return self.windows is not None and self.windows[0] > 0


@dataclass(frozen=True)
class SearchStrategy:
    """Strategy of one search.

    Attributes:
        plans: plans of the allocator, uniform first. They are all plans that may be tried, or the first ones, if the
            strategy makes plans itself.
        trials: maximum number of plans to try, for a strategy that does not try all.
        windows: number of selection windows.
        allocation: settings that turn sparsities into a plan that meets the budget.
        linears: prunable linears, by layer.
        stop_after: stop after this number of plans has been scored; None for no stop.
    """

    name: StrategyName
    plans: tuple[SparsityPlan, ...]
    trials: int
    windows: int
    allocation: AllocateSettings
    linears: Sequence[Sequence[Linear]]
    stop_after: int | None = None

    @property
    def largest_request(self) -> int:
        """Maximum number of lanes in one request."""
        if self.name == "projections":
            return self._over_projections().most_together
        if self.name in OVER_LAYERS:
            search = self._over_layers()
            at_once = search.batch if isinstance(search, BayesianSearch) else search.offspring
            return max(at_once, len(self.plans))
        return min(len(self.plans), 4) if self.name in TRIALS else len(self.plans)

    def next_lanes(self, known: KnownLosses) -> LaneRequest | None:
        """Return the lanes that run next; None if the search is complete.

        Args:
            known: losses of each plan on the first selection windows, in nats.
        """
        if self.name == "auto":
            return self._narrowed(known)
        if self._is_stopped(known):
            return None
        if self.name == "race":
            return self._race(known)
        if self.name in ("adaptive", "two-parameter"):
            return self._next_proposed(self._over_parameters(), self._plan_of_parameters, known)
        if self.name == "projections":
            return self._next_proposed(self._over_projections(), self._plan_of_projections, known)
        if self.name in OVER_LAYERS:
            return self._next_proposed(self._over_layers(), self._plan_of_layers, known)
        return None if all(plan in known for plan in self.plans) else LaneRequest(self.plans)

    def _race(self, known: KnownLosses) -> LaneRequest | None:
        running = list(self.plans)
        for part in rounds(self.windows):
            if any(len(known.get(plan, ())) < part.stop for plan in running):
                whole = len(part) == self.windows
                return LaneRequest(tuple(running), None if whole else (part.start, part.stop))
            # The uniform plan stays in every round, as the best plan is compared with it.
            out = beaten({plan: known[plan][: part.stop] for plan in running}) - {self.plans[0]}
            running = [plan for plan in running if plan not in out]
        return None

    def _narrowed(self, known: KnownLosses) -> LaneRequest | None:
        """Search on the first windows, then score uniform and the best two or three plans on the others too."""
        few = FIRST_ROUND if self.windows >= 2 * FIRST_ROUND else self.windows
        if not self._is_stopped(known):
            request = self._next_proposed(self._over_parameters(), self._plan_of_parameters, known, few)
            if request is not None:
                return request
        first = {plan: losses[:few] for plan, losses in known.items()}
        ranking = sorted(first, key=lambda plan: mean_loss(first[plan]))
        count = FINALISTS
        if len(ranking) > count and not _is_worse(first[ranking[count]], first[ranking[0]]):
            count += 1
        finalists = tuple(plan for plan in known if plan == self.plans[0] or plan in ranking[:count])
        if all(len(known[plan]) == self.windows for plan in finalists):
            return None
        return LaneRequest(finalists, (few, self.windows))

    def _is_stopped(self, known: KnownLosses) -> bool:
        return self.stop_after is not None and len(known) >= self.stop_after

    def _next_proposed(
        self,
        search: Proposals,
        plan_of: Callable[[int, Point], SparsityPlan],
        known: KnownLosses,
        first: int | None = None,
    ) -> LaneRequest | None:
        """Return the next plans that a search proposes.

        Args:
            first: number of selection windows that the plans are compared on, the first ones; None for all.
        """
        windows = self.windows if first is None else first
        done: list[Trial] = []
        while points := _points(search, tuple(done)):
            plans = tuple(plan_of(number, point) for number, point in enumerate(points, len(done)))
            if any(plan not in known for plan in plans):
                return LaneRequest(plans, None if windows == self.windows else (0, windows))
            done += [
                Trial(point, tuple(known[plan][:windows])) for point, plan in zip(points, plans, strict=True)
            ]
        return None

    def _plan_of_parameters(self, number: int, point: Point) -> SparsityPlan:
        """Return the plan of ``(beta,)`` or ``(beta, offset)``."""
        beta, offset = (*point, 0.0)[:2]
        return next(plan for plan in self.plans if (plan.beta, plan.offset) == (beta, offset))

    def _plan_of_layers(self, number: int, point: Point) -> SparsityPlan:
        """Return the plan closest to these layer sparsities that meets the budget; its beta is the trial's number."""
        target, sizes = self.allocation.target, self._layer_sizes
        return self.allocation.plan_of_layers(float(number), fitted(point, sizes, target), sizes)

    def _plan_of_projections(self, number: int, point: Point) -> SparsityPlan:
        """Return the plan of ``(beta, *offsets)``; the plan's own beta is the trial's number."""
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
        """Share of the prunable weights by kind of linear; a kind is a linear's name within its layer, without the expert."""
        numel: dict[str, int] = {}
        for layer in self.linears:
            for linear in layer:
                kind = kind_of(linear.name)
                numel[kind] = numel.get(kind, 0) + linear.numel
        return {kind: size / sum(numel.values()) for kind, size in numel.items()}

    def _over_parameters(self) -> AdaptiveSearch | TwoParameterSearch:
        spreads, offsets = (
            sorted({getattr(plan, name) for plan in self.plans}) for name in ("beta", "offset")
        )
        if len(offsets) > 1:
            return TwoParameterSearch(tuple(spreads), tuple(offsets), self.trials)
        return AdaptiveSearch(tuple(spreads), self.trials)

    def _over_projections(self) -> ProjectionSearch:
        betas = tuple(sorted(plan.beta for plan in self.plans))
        return ProjectionSearch(betas, tuple(self._shares_of_kinds.values()), self.trials)

    def _over_layers(self) -> BayesianSearch | EvolutionarySearch:
        sizes = [[linear.numel for linear in layer] for layer in self.linears]
        starts = tuple(plan.by_layer(sizes) for plan in self.plans)
        if self.name == "evolutionary":
            return EvolutionarySearch(self._layer_sizes, starts, self.trials)
        return BayesianSearch(self.allocation.target, starts, budget=self.trials)


def _is_worse(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Return whether a plan is worse than another one on the same windows, by more than ``T_OF_FINALISTS``."""
    difference = paired_difference(losses, others)
    return difference.mean > 0 if difference.t is None else difference.t > T_OF_FINALISTS


@lru_cache(maxsize=1 << 12)
def _points(search: Proposals, trials: tuple[Trial, ...]) -> tuple[Point, ...]:
    """Return the points that a search proposes after these trials; cached, as replays repeat and Optuna is slow."""
    return search.propose(trials)


def strategy_of(
    settings: Search, plans: Sequence[SparsityPlan], linears: Sequence[Sequence[Linear]], windows: int
) -> SearchStrategy:
    """Return the strategy of a search.

    Args:
        linears: all linears of the model, by layer.
        windows: number of selection windows.

    Raises:
        ImportError: the strategy is bayesian, and Optuna is not installed.
    """
    if settings.strategy == "bayesian":
        require_optuna()
    prunable = settings.pruning("auto").prunable(linears)
    trials = settings.trials_of(len(plans))
    return SearchStrategy(
        settings.strategy_for(len(plans)),
        tuple(plans),
        trials,
        windows,
        settings.allocation,
        prunable,
        settings.stop_after,
    )


def first_lanes(
    settings: Search,
    plans: Sequence[SparsityPlan],
    linears: Sequence[Sequence[Linear]],
    windows: int | None,
) -> LaneRequest:
    """Return the first request of a search, before any loss is known.

    Args:
        windows: number of selection windows; None if they are not counted yet.
    """
    if windows is None and settings.strategy == "race":
        return LaneRequest(tuple(plans))
    request = strategy_of(settings, plans, linears, windows or 0).next_lanes({})
    assert request is not None, "a search without losses is not complete"
    return request
