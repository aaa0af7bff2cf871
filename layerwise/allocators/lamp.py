"""LAMP: one threshold over all layers on layer-adaptive magnitude scores (Lee et al., ICLR 2021, arXiv:2010.07611).

The score of a weight is its square divided by the sum of the squares of all weights of the same linear that are not
smaller. Needs no calibration text. The largest weight of every linear has score 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.allocators.budget import between, check_strength
from layerwise.allocators.global_threshold import PIECE


@dataclass(frozen=True)
class LAMP:
    """Give every entry the fraction of its weights whose LAMP scores are below the threshold of the whole model.

    Attributes:
        strength: 1 for the published plan; smaller values lie between it and uniform.
    """

    strength: float = 1.0
    method: Literal["lamp"] = "lamp"

    def __post_init__(self) -> None:
        check_strength(self.method, self.strength)

    def allocate(self, scores: Sequence[float], sizes: Sequence[int], target: float) -> tuple[float, ...]:
        """Return the sparsity of every entry from its fraction of weights below the threshold for ``target``."""
        return between(scores, sizes, target, self.strength)


def lamp_scores(weight: Tensor) -> Iterator[Tensor]:
    """Yield the LAMP scores of one linear in pieces, the largest scores first; their places in the weight are lost.

    Squares are summed in float64. Of equal weights, the first ones in the order of the sort have the smaller scores, as
    published.

    Memory: a sorted copy of the weight in float32, on the CPU.

    Args:
        weight: any shape; left unchanged.

    Yields:
        float32, on the CPU. Zero for weights that are zero.
    """
    magnitudes = weight.detach().float().abs().cpu().reshape(-1).numpy()
    magnitudes.sort()
    larger = torch.zeros((), dtype=torch.float64)
    for end in range(len(magnitudes), 0, -PIECE):
        squares = torch.from_numpy(magnitudes[max(end - PIECE, 0) : end]).double().square_().flip(0)
        sums = squares.cumsum(0).add_(larger)
        larger = sums[-1]
        yield torch.where(squares > 0, squares / sums, 0).float()
