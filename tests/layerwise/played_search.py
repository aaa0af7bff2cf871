"""A search played to its end on a loss that is a function of the point."""

from collections.abc import Callable

from layerwise.strategies.trials import Point, Strategy, Trial


def proposals(search: Strategy, loss: Callable[[Point], float]) -> list[tuple[Point, ...]]:
    """What it proposes, batch by batch."""
    trials: list[Trial] = []
    batches = []
    while points := search.propose(trials):
        batches.append(points)
        trials += [Trial(point, (loss(point),)) for point in points]
    return batches


def tried(search: Strategy, loss: Callable[[Point], float]) -> list[Point]:
    """All points, in their order."""
    return [point for batch in proposals(search, loss) for point in batch]
