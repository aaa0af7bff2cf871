"""Magnitude pruning: the smallest weights of a matrix go first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.calibration.statistics import InputStatistics
from layerwise.pruners.masks import removal_levels


@dataclass(frozen=True)
class Magnitude:
    """Compares all weights of one matrix; needs no calibration text."""

    method: Literal["magnitude"] = "magnitude"

    def removal_levels(
        self, weight: Tensor, inputs: InputStatistics, counts: Sequence[int], group: int | None = None
    ) -> Tensor:
        """Order in which weights go; ``inputs`` is not looked at. See ``Wanda.removal_levels``."""
        return removal_levels(weight, torch.abs, counts, by_row=False, group=group)
