"""Wanda: score each weight by its magnitude times the norm of its input (arXiv:2306.11695)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from layerwise.calibration.statistics import InputStatistics
from layerwise.pruners.masks import removal_levels


@dataclass(frozen=True)
class Wanda:
    """Compares the weights of one output row, whatever the other rows hold; the remaining weights stay as they are."""

    method: Literal["wanda"] = "wanda"

    def removal_levels(
        self, weight: Tensor, inputs: InputStatistics, counts: Sequence[int], group: int | None = None
    ) -> Tensor:
        """Order in which weights go, for several numbers of removed weights at once (see
        ``masks.removal_levels``).

        Args:
            weight: shape ``(out_features, in_features)``; left unchanged.
            inputs: what calibration saw of the ``in_features`` inputs.
            counts: ascending numbers of weights to remove.
            group: M of an N:M pattern; None for none.

        Raises:
            ValueError: no calibration token reached this linear.
        """
        if inputs.tokens == 0:
            raise ValueError(
                "Wanda needs input statistics, but no calibration token reached this linear. If there were calibration "
                "windows, the model uses its weight without calling it, or never (Mamba's dt_proj): leave it dense "
                "(--exclude with its name), or use Magnitude, which needs no calibration text."
            )
        norms = inputs.norms.to(weight.device)
        return removal_levels(
            weight, lambda rows: rows.abs().float() * norms, counts, by_row=True, group=group
        )
