"""Plans that test ATP's theorems (arXiv:2502.14770, section 3).

Uniform plans at several sparsities test theorems 3.1 and 3.2. One arithmetic progression in several orders tests
theorem 3.5, by which the ascending order has the lowest error.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.allocators.atp import arithmetic, largest_beta
from layerwise.allocators.budget import fitted
from layerwise.allocators.sparsity_plan import SparsityPlan

LEVELS = tuple(tenths / 10 for tenths in range(1, 10))
SEEDS = (0, 1, 2, 3)  # seeds of the shuffled orders
DEFAULT_SHARE = 1 / 6  # default beta, as a fraction of the largest legal beta
UNIFORM, ASCENDING, DESCENDING = "uniform", "ascending", "descending"


@dataclass(frozen=True)
class TheoryPlan:
    """A plan and its place in the test of the theorems.

    Attributes:
        order: order of the sparsities over the depth: "uniform", "ascending", "descending", or "shuffled 0", ...
        target: overall sparsity, the parameter-weighted mean of the layers.
        plan: sparsity of every layer.
    """

    order: str
    target: float
    plan: SparsityPlan


def theory_plans(target: float, beta: float | None, layer_sizes: Sequence[int]) -> tuple[TheoryPlan, ...]:
    """Return the uniform plans by ascending sparsity, including ``target``, then the orders, the ascending order first.

    Duplicate orders are omitted; two or three layers have only a few orders. If layers differ in size, each order is
    shifted by a common amount, so that all orders have the same overall sparsity.

    The default beta is a sixth of the largest legal beta, which is close to the best beta of a grid: for SmolLM2-135M
    at .6 it is .0046, and the largest is .0276. With half of the largest beta, the uniform plan had the lowest
    perplexity (46.06; ascending: 52.81), so the comparison was between plans that are all worse than uniform.

    Args:
        target: overall sparsity of the orders, between 0 and 1.
        beta: common difference of the ascending order; None for ``DEFAULT_SHARE`` of the largest legal beta.
        layer_sizes: number of prunable weights of every layer.

    Raises:
        ValueError: there is only one layer, or beta is not positive or outside the legal range.
    """
    if len(layer_sizes) < 2:
        raise ValueError(
            f"the model has {len(layer_sizes)} decoder layer, but the theorems compare orders of several layers. "
            "Use a model with at least two layers."
        )
    if beta is None:
        beta = DEFAULT_SHARE * largest_beta(target, layer_sizes)
    if beta <= 0:
        raise ValueError(
            f"beta is {beta:g}; the ascending order needs a positive beta. Give a positive number, or leave beta out "
            "for the default."
        )
    ascending = arithmetic(target, beta, layer_sizes).by_layer([[size] for size in layer_sizes])
    orders = {ASCENDING: ascending, DESCENDING: ascending[::-1]}
    orders |= {f"shuffled {seed}": _shuffled(ascending, seed) for seed in SEEDS}
    plans = [
        TheoryPlan(UNIFORM, level, SparsityPlan(0.0, (level,) * len(layer_sizes)))
        for level in sorted({*LEVELS, target})
    ]
    seen: set[tuple[float, ...]] = set()
    for order, layers in orders.items():
        if layers not in seen:
            plans.append(TheoryPlan(order, target, SparsityPlan(beta, fitted(layers, layer_sizes, target))))
        seen.add(layers)
    return tuple(plans)


def _shuffled(layers: Sequence[float], seed: int) -> tuple[float, ...]:
    return tuple(random.Random(seed).sample(layers, len(layers)))
