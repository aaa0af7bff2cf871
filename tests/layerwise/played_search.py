"""Run of a search strategy to its end, with a loss that is a function of the point."""

from collections.abc import Callable

from layerwise.strategies.trials import Point, Strategy, Trial


def proposals(search: Strategy, loss: Callable[[Point], float]) -> list[tuple[Point, ...]]:
    """Return all proposals of a strategy."""
    trials: list[Trial] = []
    batches = []
    while points := search.propose(trials):
        batches.append(points)
        trials += [Trial(point, (loss(point),)) for point in points]
    return batches


def tried(search: Strategy, loss: Callable[[Point], float]) -> list[Point]:
    """Return all proposed points in order."""
    return [point for batch in proposals(search, loss) for point in batch]
