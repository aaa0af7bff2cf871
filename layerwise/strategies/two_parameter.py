"""Two-parameter search: spread of the sparsities over depth, and offset between attention and MLP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerwise.strategies.adaptive import check_ascending, check_budget, next_indices
from layerwise.strategies.trials import Point, Trial, losses_by_index

Cell = tuple[int, int]  # index of the spread, index of the offset


@dataclass(frozen=True)
class TwoParameterSearch:
    """Search along the spread at offset 0, then along the offset at the best spread, then around the best point.

    All points of the one-parameter search remain candidates, so the second parameter can only improve the result; on
    some models an offset between attention and MLP is harmful. The search ends when none of the eight neighbours of the
    best point is better, or when the budget is spent.

    Attributes:
        spreads: ascending spreads (for instance betas), starting with 0 (uniform), which is always tried.
        offsets: ascending offsets, including 0.
        budget: maximum number of trials; half of them (rounded up, at least 3) are for the first search.
    """

    spreads: tuple[float, ...]
    offsets: tuple[float, ...]
    budget: int = 12

    def __post_init__(self) -> None:
        check_ascending(self.spreads, "spreads")
        check_ascending(self.offsets, "offsets")
        if self.spreads[0] != 0 or 0 not in self.offsets:
            raise ValueError(
                f"the spreads begin with {self.spreads[0]:g} and the offsets are {self.offsets}; the uniform plan "
                "(spread 0, offset 0) must be among the points. Insert 0 as the first spread and among the offsets."
            )
        check_budget(self.budget)

    def propose(self, trials: Sequence[Trial]) -> tuple[Point, ...]:
        """Return the next points to try, each ``(spread, offset)``; see ``trials.Strategy``."""
        points = [(spread, offset) for spread in self.spreads for offset in self.offsets]
        by_index = losses_by_index(trials, points)
        losses = {divmod(index, len(self.offsets)): loss for index, loss in by_index.items()}
        left = max(self.budget - len(trials), 0)
        return tuple((self.spreads[row], self.offsets[column]) for row, column in self._cells(losses)[:left])

    def _cells(self, losses: Mapping[Cell, float]) -> Sequence[Cell]:
        """Return the next cells to try, regardless of the budget."""
        zero = self.offsets.index(0)
        along_spread = {row: loss for (row, column), loss in losses.items() if column == zero}
        left = max((self.budget + 1) // 2, 3) - len(along_spread)
        if left > 0 and (rows := next_indices(self.spreads, along_spread)[:left]):
            return [(row, zero) for row in rows]
        steepness = min(along_spread, key=lambda row: (along_spread[row], row))
        along_offset = {column: loss for (row, column), loss in losses.items() if row == steepness}
        if columns := next_indices(self.offsets, along_offset):
            return [(steepness, column) for column in columns]
        return self._around(min(losses, key=lambda cell: (losses[cell], cell)), losses)

    def _around(self, best: Cell, losses: Mapping[Cell, float]) -> Sequence[Cell]:
        """Return the untried neighbours of the best cell along an axis; if there are none, the diagonal ones."""
        for diagonal in (False, True):
            around = [
                (best[0] + down, best[1] + right)
                for down in (-1, 0, 1)
                for right in (-1, 0, 1)
                if (down != 0 and right != 0) == diagonal
            ]
            untried = [
                (row, column)
                for row, column in around
                if 0 <= row < len(self.spreads)
                and 0 <= column < len(self.offsets)
                and (row, column) not in losses
            ]
            if untried:
                return untried
        return []
