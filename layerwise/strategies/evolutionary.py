"""Evolutionary search over the sparsities of all layers: mutate the best plans (EvoPress, arXiv:2410.14649).

As in EvoPress, a mutation exchanges levels between layers, so every plan removes exactly the same number of weights and
needs no repair. Here a level is a number of weights, so layers of different sizes can exchange levels.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.allocators.budget import weighted_mean
from layerwise.allocators.sparsity_plan import SparsityPlan, removed_per_linear
from layerwise.strategies.adaptive import check_budget
from layerwise.strategies.trials import Point, Trial, comparable_losses, seed_of_proposal

MOST_MOVES = 3  # a mutation makes min(U{1..3}, U{1..3}) moves, as in EvoPress: usually 1
# Maximum number of draws per proposal; afterwards, the neighborhood of the survivors counts as exhausted.
DRAWS = 1000

Removed = tuple[int, ...]  # number of removed weights of every layer


@dataclass(frozen=True)
class EvolutionarySearch:
    """Search whose generations mutate the best plans of all earlier generations, including the parents.

    The search ends when the budget is spent, or when all plans near the survivors have been tried.

    Attributes:
        layer_sizes: number of prunable weights of every layer.
        parents: plans to try first, for instance uniform and ATP; one sparsity per layer, and the same weighted mean
            for all plans.
        budget: maximum number of trials, including parents.
        step: change of sparsity per move, for a layer of mean size.
        offspring: number of plans per generation.
        survivors: number of best plans from which one is drawn for every offspring.
        seed: seed of the draws, combined with the number of trials so far.
    """

    layer_sizes: tuple[int, ...]
    parents: tuple[Point, ...]
    budget: int = 64
    step: float = 0.02
    offspring: int = 8
    survivors: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if not self.parents or min(self.offspring, self.survivors) < 1 or not 0 < self.step < 1:
            raise ValueError(
                f"an evolutionary search cannot have {len(self.parents)} parents, {self.offspring} offspring, "
                f"{self.survivors} survivors and a step of {self.step:g}. Give at least one parent (such as the uniform "
                "plan), one offspring and one survivor, and a step within (0, 1)."
            )
        for parent in self.parents:
            self._removed(parent)

    def propose(self, trials: Sequence[Trial]) -> tuple[Point, ...]:
        """Return the next points to try, each the sparsities of all layers; see ``trials.Strategy``."""
        left = max(self.budget - len(trials), 0)
        known = {self._removed(trial.point) for trial in trials}
        parents: dict[Removed, Point] = {}
        for parent in self.parents:
            parents.setdefault(self._removed(parent), parent)
        untried = [parent for removed, parent in parents.items() if removed not in known]
        if untried or left == 0:
            return tuple(untried[:left])
        losses = comparable_losses(trials)
        ranking = sorted(range(len(trials)), key=lambda index: losses[index])
        survivors = [self._removed(trials[index].point) for index in ranking[: self.survivors]]
        dice = random.Random(seed_of_proposal(self.seed, trials))
        born: list[Removed] = []
        for _ in range(DRAWS):
            if len(born) == min(self.offspring, left):
                break
            child = self._mutated(dice.choice(survivors), dice)
            if child not in known:
                known.add(child)
                born.append(child)
        return tuple(self._point(child) for child in born)

    def _mutated(self, removed: Removed, dice: random.Random) -> Removed:
        """Move levels between layers; return the plan unchanged if that is not possible."""
        level = max(1, round(self.step * sum(self.layer_sizes) / len(self.layer_sizes)))
        child = list(removed)
        for _ in range(min(dice.randint(1, MOST_MOVES), dice.randint(1, MOST_MOVES))):
            sizes = enumerate(self.layer_sizes)
            more = [layer for layer, size in sizes if child[layer] + level <= size]
            less = [layer for layer, count in enumerate(child) if count >= level]
            pairs = [(up, down) for up in more for down in less if up != down]
            if pairs:
                up, down = dice.choice(pairs)
                child[up] += level
                child[down] -= level
        return tuple(child)

    def _removed(self, point: Point) -> Removed:
        """Return the number of removed weights of every layer, with the same total for all points.

        The inverse of ``_point``.
        """
        target = weighted_mean(self.parents[0], self.layer_sizes)
        counts = removed_per_linear(SparsityPlan(0.0, point), target, [[size] for size in self.layer_sizes])
        return tuple(count for (count,) in counts)

    def _point(self, removed: Removed) -> Point:
        return tuple(count / size for count, size in zip(removed, self.layer_sizes, strict=True))
