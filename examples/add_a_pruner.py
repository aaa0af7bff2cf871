"""Search with a pruner of your own, without a change of the package: RIA (Zhang et al., ICLR 2024).

    .venv/bin/python examples/add_a_pruner.py

Prunes the demo model with it, and keeps everything in the folder ``runs``. Takes some minutes on two cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from layerwise import Runtime, Search, search
from layerwise.calibration.statistics import InputStatistics
from layerwise.flows.orchestration.embedded_server import ServerStart
from layerwise.flows.pipeline.result import SearchResult
from layerwise.pruners.masks import removal_levels


@dataclass(frozen=True)
class RIA:
    """Score a weight by its share of the magnitudes of its row and of its column, times the norm of its input."""

    method: Literal["ria"] = "ria"
    exponent: float = 0.5  # of the norm

    def removal_levels(
        self, weight: Tensor, inputs: InputStatistics, counts: Sequence[int], group: int | None = None
    ) -> Tensor:
        """Return, for every weight, the index of the first of ``counts`` at which it is removed."""
        norms = inputs.norms.to(weight.device) ** self.exponent
        of_columns = weight.abs().float().sum(dim=0)

        def score(rows: Tensor) -> Tensor:
            magnitudes = rows.abs().float()
            return (magnitudes / of_columns + magnitudes / magnitudes.sum(dim=1, keepdim=True)) * norms

        return removal_levels(weight, score, counts, by_row=True, group=group)


class RIASearch(Search):
    """A search whose pruner is RIA. The pruner's settings are part of the keys in the store."""

    pruner: RIA = RIA()


def main(runtime: Runtime, **settings: object) -> SearchResult:
    """Run the search, and print what it found."""
    result = search(RIASearch.model_validate(settings), runtime)
    print(f"{result.selection.verdict}\ntest text: {result.test}\n{result.pruned}")
    return result


if __name__ == "__main__":
    ServerStart().wait()
    windows = {"seqlen": 512, "calibration_windows": 16, "selection_windows": 12, "test_windows": 12}
    main(Runtime(store="runs"), model="demo", sparsity=0.6, **windows)
