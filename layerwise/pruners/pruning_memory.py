"""Memory of the pruners that use second moments, from shapes alone; checked by tests/benchmarks/gram_memory.py."""

from layerwise.calibration.upper_triangle import panel_entries
from layerwise.models.skeleton import Linear
from layerwise.pruners.alps import ALPS
from layerwise.pruners.dsnot import REFINED_ENTRIES, DSnoT
from layerwise.pruners.layer_pruning import WeightPruner
from layerwise.pruners.row_levels import SCORE_BYTES
from layerwise.pruners.sparsegpt import DOUBLE_INPUTS, PANEL, SparseGPT
from layerwise.pruners.wanda_swaps import SWEPT_ENTRIES
from layerwise.sparse.native import kernel


def prepared_bytes(pruner: WeightPruner, in_features: int) -> int:
    """Return the size of the result of ``prepare``, which is kept until all lanes of a layer are pruned."""
    inverses = pruner.levels * panel_entries(in_features) if isinstance(pruner, ALPS) else 0
    return 4 * (in_features**2 + inverses)


def temporary_bytes(pruner: WeightPruner, linear: Linear, itemsize: int) -> int:
    """Return the memory to prepare or prune one linear, in addition to its weight and to ``prepared_bytes``.

    Args:
        itemsize: bytes of one weight of the result.
    """
    inputs, weights = linear.in_features, linear.numel
    result_and_mask = (itemsize + 1) * weights
    match pruner:
        case ALPS():
            # A whole matrix, and five copies of the weight while the sixth is ranked; a fit needs six. And two masks.
            ranked = 4 if kernel() else SCORE_BYTES - 1
            return 4 * inputs**2 + (5 * 4 + ranked + 2) * weights
        case SparseGPT():
            in_double = 8 * inputs**2 if inputs <= DOUBLE_INPUTS else 0
            two_panels = 2 * 8 * PANEL * inputs
            return max(in_double + two_panels, 4 * weights + result_and_mask)
        case DSnoT():
            # SparseGPT's factor replaces the matrix; or eight copies of the rows that are refined, and the mask.
            in_double = 8 * inputs**2 if inputs <= DOUBLE_INPUTS else 0
            factor = in_double + 2 * 8 * PANEL * inputs if pruner.initial == "sparsegpt" else 0
            refined = max(min(weights, REFINED_ENTRIES), inputs)
            return max(factor, 8 * 4 * refined + weights + result_and_mask)
        case _:
            # Seven copies of the rows that are refined, and the masks before and after.
            swept = max(min(weights, SWEPT_ENTRIES), inputs)
            return 7 * 4 * swept + 2 * weights + result_and_mask
