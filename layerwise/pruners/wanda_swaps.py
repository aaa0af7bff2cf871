"""Wanda's masks, improved by swaps: second moments decide which weights go; those that stay are untouched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from layerwise.pruners.mask_swaps import refine
from layerwise.pruners.masks import removal_levels

MOST_ROUNDS = 1000  # a search with a typing error would not end


@dataclass(frozen=True)
class WandaSwaps:
    """Starts from Wanda's mask (arXiv:2306.11695); see ``mask_swaps.refine`` for the swaps.

    Attributes:
        rounds: of swaps at most, each through all inputs; on real layers the first brings nine tenths of the gain.
    """

    method: Literal["wanda_swaps"] = "wanda_swaps"
    rounds: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rounds <= MOST_ROUNDS:
            raise ValueError(
                f"rounds is {self.rounds}; it must be at least 0, which is Wanda itself, and at most {MOST_ROUNDS}."
            )

    def prepare(self, gram: Tensor, tokens: int) -> Tensor:
        """The second moments as they are.

        Args:
            gram: sum of ``x x^T`` over the tokens, shape ``(in_features, in_features)``.
            tokens: how many.

        Raises:
            ValueError: no token.
        """
        if tokens < 1:
            raise ValueError("swaps need second moments, but there was no token. Pass at least one window.")
        return gram

    def prune(self, weight: Tensor, prepared: Tensor, count: int, group: int | None = None) -> Tensor:
        """The weight with ``count`` entries zero and all others as they were.

        Every row loses the same number, the first ones one more where ``count`` is not a multiple of the rows.

        Args:
            weight: shape ``(out_features, in_features)``; left unchanged.
            prepared: of the linear's inputs, see ``prepare``.
            count: how many weights to remove.
            group: M of an N:M pattern; None for none.

        Raises:
            ValueError: a count that is out of range or does not fit the pattern; values that are not finite.
        """
        norms = prepared.diagonal().sqrt()

        def score(rows: Tensor) -> Tensor:
            return rows.abs().float() * norms

        counts: Sequence[int] = [count]
        mask = removal_levels(weight, score, counts, by_row=True, group=group) == 0
        return weight.masked_fill(refine(weight, mask, prepared, self.rounds, group), 0)
