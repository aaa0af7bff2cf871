"""Bayesian search over the sparsities of all layers: the baseline in ATP's table of search methods (arXiv:2502.14770).

As in the paper, it uses Optuna, whose sampler is the tree-structured Parzen estimator (Bergstra et al., NIPS 2011).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from layerwise.strategies.adaptive import check_budget
from layerwise.strategies.trials import Point, Trial, comparable_losses, seed_of_proposal

SLACK = 1e-9  # tolerance for starts at the bounds, because S - d and the plan at the bound are rounded differently


@dataclass(frozen=True)
class BayesianSearch:
    """Search over unconstrained points with one number per layer, which the caller projects (``budget.fitted``).

    For every proposal, a new sampler is given all trials, so the proposal depends on nothing else. Sampling is
    multivariate, and the constant liar keeps the points of one proposal apart. Both are Optuna's defaults as of version
    5; up to version 4 it sampled every coordinate separately.

    Attributes:
        target: overall sparsity, the middle of the range of every layer.
        starts: points to try first, for instance uniform and ATP; one sparsity per layer.
        deviation: largest difference between a layer's sparsity and the target; sparsities stay within [0, 1].
        budget: maximum number of trials, including starts; the 33 hours of the paper are about 1000 trials.
        batch: number of points per proposal.
        random_trials: number of trials, including starts, before sampling uses the losses; until then it is random.
        seed: seed of the sampler, combined with the number of trials so far.
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
                f"a Bayesian search cannot have target {self.target:g}, deviation {self.deviation:g}, batch "
                f"{self.batch} and {self.random_trials} random trials. The target must lie in [0, 1], and the others "
                "must be positive."
            )
        if not self.starts or len({len(start) for start in self.starts}) > 1 or not self.starts[0]:
            raise ValueError(
                f"the starts have {[len(start) for start in self.starts]} layers. Give at least one start, such as the "
                "uniform plan, and one sparsity for every layer in each."
            )
        low, high = self.bounds
        for index, start in enumerate(self.starts):
            if not all(low - SLACK <= sparsity <= high + SLACK for sparsity in start):
                raise ValueError(
                    f"start {index} has sparsities from {min(start):.4f} to {max(start):.4f}, outside the searched "
                    f"range [{low:.4f}, {high:.4f}]. Raise the deviation, or remove this start."
                )

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the lowest and the highest sparsity of a layer."""
        return max(0.0, self.target - self.deviation), min(1.0, self.target + self.deviation)

    def propose(self, trials: Sequence[Trial]) -> tuple[Point, ...]:
        """Return the next points to try, each one number per layer before projection; see ``trials.Strategy``.

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
        """Sample points from a new study that contains all trials."""
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
        while len(points) < count:  # ends, because duplicates are rare in a range of floats
            asked = study.ask(space).params
            point = tuple(asked[name] for name in names)
            if point not in known:
                points[point] = None
        return tuple(points)


def require_optuna() -> None:
    """Raise if Optuna is not installed.

    Raises:
        ImportError: Optuna is not installed.
    """
    if find_spec("optuna") is None:
        raise ImportError(
            "the Bayesian search needs Optuna, which is not installed: pip install layerwise-pruning[bayesian]"
        )
