"""Wanda: score each weight by its magnitude times the norm of its input (arXiv:2306.11695)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from layerwise.calibration.statistics import InputStatistics
from layerwise.pruners.masks import removal_levels


@dataclass(frozen=True)
class Wanda:
    """Compare the weights within each output row. The remaining weights do not change."""

    method: Literal["wanda"] = "wanda"

    def removal_levels(
        self, weight: Tensor, inputs: InputStatistics, counts: Sequence[int], group: int | None = None
    ) -> Tensor:
        """Return the removal order for several numbers of removed weights at once (see ``masks.removal_levels``).

        Args:
            weight: shape ``(out_features, in_features)``; left unchanged.
            inputs: input statistics of the linear.
            counts: ascending numbers of weights to remove.
            group: M of an N:M pattern; None without a pattern.

        Raises:
            ValueError: ``inputs`` contains no tokens.
        """
        if inputs.tokens == 0:
            raise ValueError(
                "Wanda needs input statistics, but this linear received 0 calibration tokens. If there are calibration "
                "windows, the model does not call this linear (such as Mamba's dt_proj, whose weight is used without a "
                "call). Leave it dense (--exclude with its name), or use Magnitude, which needs no calibration text."
            )
        norms = inputs.norms.to(weight.device)
        return removal_levels(
            weight, lambda rows: rows.abs().float() * norms, counts, by_row=True, group=group
        )
