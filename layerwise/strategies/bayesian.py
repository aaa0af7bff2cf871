"""Bayesian search over the sparsities of all layers: the baseline of ATP's table of search methods (arXiv:2502.14770).

The paper names Optuna, whose sampler is the tree-structured Parzen estimator (Bergstra et al., NIPS 2011).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from layerwise.strategies.adaptive import check_budget
from layerwise.strategies.trials import Point, Trial, comparable_losses, seed_of_proposal

SLACK = 1e-9  # a start may leave the range by this much: S - d and the plan at the bound round differently


@dataclass(frozen=True)
class BayesianSearch:
    """Points are free vectors of one number per layer: the caller projects them onto the budget (``budget.fitted``).

    Every proposal tells a new sampler all trials and asks it, so what it proposes depends on nothing else. Sampling
    is multivariate, and those of one proposal are kept apart by the constant liar: Optuna's defaults (as of
    version 5; up to 4 it sampled every coordinate by itself).

    Attributes:
        target: overall sparsity, the middle of the range of every layer.
        starts: points that are tried first: uniform and ATP, for instance. One sparsity per layer.
        deviation: a layer may be so far from the target, within [0, 1].
        budget: at most so many trials, starts included; the paper's 33 hours are about 1000.
        batch: points per proposal.
        random_trials: points are random until so many trials, starts included, are known.
        seed: of the sampler, together with the number of trials so far.
    """

    target: float
    starts: tuple[Point, ...]
    deviation: float = 0.3
    budget: int = 64
    batch: int = 4
    random_trials: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if not 0 <= self.target <= 1 or not self.deviation > 0 or min(self.batch, self.random_trials) < 1:
            raise ValueError(
                f"a Bayesian search with target {self.target:g}, deviation {self.deviation:g}, batch {self.batch} and "
                f"{self.random_trials} random trials is none. The target lies in [0, 1], all others are positive."
            )
        if not self.starts or len({len(start) for start in self.starts}) > 1 or not self.starts[0]:
            raise ValueError(
                f"the starts have {[len(start) for start in self.starts]} layers. Give at least one, such as the "
                "uniform plan, with one sparsity for every layer."
            )
        low, high = self.bounds
        for index, start in enumerate(self.starts):
            if not all(low - SLACK <= sparsity <= high + SLACK for sparsity in start):
                raise ValueError(
                    f"start {index} has sparsities from {min(start):.4f} to {max(start):.4f}, outside of the range "
                    f"[{low:.4f}, {high:.4f}] that is searched. Raise the deviation, or leave that start out."
                )

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest sparsity of a layer."""
        return max(0.0, self.target - self.deviation), min(1.0, self.target + self.deviation)

    def propose(self, trials: Sequence[Trial]) -> tuple[Point, ...]:
        """See ``trials.Strategy``; a point is a number for every layer, before its projection.

        Raises:
            ImportError: Optuna is not installed.
        """
        left = max(self.budget - len(trials), 0)
        known = {trial.point for trial in trials}
        starts = [start for start in dict.fromkeys(self.starts) if start not in known]
        if starts or left == 0:
            return tuple(starts[:left])
        return self._sampled(trials, min(self.batch, left))

    def _sampled(self, trials: Sequence[Trial], count: int) -> tuple[Point, ...]:
        """Ask a new study that was told all trials."""
        require_optuna()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        low, high = self.bounds
        names = [f"layer {index}" for index in range(len(self.starts[0]))]
        each: optuna.distributions.BaseDistribution = optuna.distributions.FloatDistribution(low, high)
        space = dict.fromkeys(names, each)
        sampler = optuna.samplers.TPESampler(
            seed=seed_of_proposal(self.seed, trials),
            n_startup_trials=self.random_trials,
            multivariate=True,
            constant_liar=True,
        )
        study = optuna.create_study(sampler=sampler)
        told = [
            optuna.trial.create_trial(
                params={
                    name: min(max(value, low), high) for name, value in zip(names, trial.point, strict=True)
                },
                distributions=space,
                value=loss,
            )
            for trial, loss in zip(trials, comparable_losses(trials), strict=True)
        ]
        study.add_trials(told)
        points: dict[Point, None] = {}
        known = {trial.point for trial in trials}
        while len(points) < count:  # a range of floats is not used up: a point comes twice by accident only
            asked = study.ask(space).params
            point = tuple(asked[name] for name in names)
            if point not in known:
                points[point] = None
        return tuple(points)


def require_optuna() -> None:
    """Refuse a search for which Optuna is missing.

    Raises:
        ImportError: it is not installed.
    """
    if find_spec("optuna") is None:
        raise ImportError(
            "the Bayesian search needs Optuna, which is not installed: pip install layerwise-pruning[bayesian]"
        )
