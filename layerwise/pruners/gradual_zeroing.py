"""One weight goes through the masks of several lanes, in place."""

from collections.abc import Sequence

from torch import Tensor


class GradualZeroing:
    """Brings one weight, in place, from one lane's mask to the next, keeping only the values that a later
    lane needs again.

    Lanes are visited by rising sparsity of the layer, so nearly always more weights go and none comes back;
    rounding to whole weights can put two lanes of equal sparsity the other way round for single linears.

    Args:
        weight: changed in place.
        levels: see ``masks.removal_levels``; same shape.
        targets: for every lane in the order of the visits, the highest level it removes; -1 removes nothing.
    """

    def __init__(self, weight: Tensor, levels: Tensor, targets: Sequence[int]) -> None:
        self._weight, self._levels, self._targets = weight, levels, list(targets)
        self._reached = -1
        self._taken: dict[int, Tensor] = {}

    def visit(self, lane: int) -> None:
        """Set the weight to the mask of the ``lane``-th visit."""
        target, later = self._targets[lane], self._targets[lane + 1 :]
        lowest_later = min(later, default=target)
        while self._reached < target:
            self._reached += 1
            mask = self._levels == self._reached
            if self._reached > lowest_later:
                self._taken[self._reached] = self._weight[mask]
            self._weight.masked_fill_(mask, 0)
        while self._reached > target:
            self._weight[self._levels == self._reached] = self._taken.pop(self._reached)
            self._reached -= 1
