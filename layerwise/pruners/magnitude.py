"""Magnitude pruning: remove the smallest weights of a matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.calibration.statistics import InputStatistics
from layerwise.pruners.masks import removal_levels


@dataclass(frozen=True)
class Magnitude:
    """Compare all weights of a matrix by magnitude. Needs no calibration text."""

    method: Literal["magnitude"] = "magnitude"

    def removal_levels(
        self, weight: Tensor, inputs: InputStatistics, counts: Sequence[int], group: int | None = None
    ) -> Tensor:
        """Return the removal order; ``inputs`` is ignored. See ``Wanda.removal_levels``."""
        return removal_levels(weight, torch.abs, counts, by_row=False, group=group)
