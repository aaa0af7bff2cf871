"""The plans by which ATP's theorems are looked at (arXiv:2502.14770, section 3).

One sparsity for all layers, at several levels (theorems 3.1 and 3.2); and the numbers of one arithmetic progression in
several orders (theorem 3.5, which says that of all orders the ascending one has the least error).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.allocators.atp import arithmetic, largest_beta
from layerwise.allocators.budget import fitted
from layerwise.allocators.sparsity_plan import SparsityPlan

LEVELS = tuple(tenths / 10 for tenths in range(1, 10))
SEEDS = (0, 1, 2, 3)  # of the shuffled orders
DEFAULT_SHARE = 1 / 6  # of the largest legal beta
UNIFORM, ASCENDING, DESCENDING = "uniform", "ascending", "descending"


@dataclass(frozen=True)
class TheoryPlan:
    """One plan that is tried.

    Attributes:
        order: "uniform", "ascending", "descending", or "shuffled 0", ...: how its sparsities lie over the depth.
        target: overall sparsity, the parameter-weighted mean of its layers.
    """

    order: str
    target: float
    plan: SparsityPlan


def theory_plans(target: float, beta: float | None, layer_sizes: Sequence[int]) -> tuple[TheoryPlan, ...]:
    """The uniform plans by rising sparsity, ``target`` among them; then the orders, the ascending one first.

    An order that is the same as one before it, as there are only few of two or three layers, is left out. Of layers of
    different sizes each order is shifted by one common amount, so that all remove the same share.

    Without a beta it is a sixth of the largest legal one, near the best of a grid over that range: of SmolLM2-135M at
    .6 that was .0046 of .0276. With half of it the uniform plan had the lowest perplexity (46.06; ascending: 52.81), so
    that orders were compared which nobody would choose.

    Args:
        target: overall sparsity of the orders, between 0 and 1.
        beta: common difference of the ascending order; None for ``DEFAULT_SHARE`` of the largest legal one.
        layer_sizes: number of prunable weights of every layer.

    Raises:
        ValueError: a single layer, or a beta that is not positive or outside of the legal range.
    """
    if len(layer_sizes) < 2:
        raise ValueError(
            f"the model has {len(layer_sizes)} decoder layer, and the theorems are about the order of several. "
            "Take a model of two layers or more."
        )
    if beta is None:
        beta = DEFAULT_SHARE * largest_beta(target, layer_sizes)
    if beta <= 0:
        raise ValueError(
            f"beta is {beta:g}: with it all layers have the same sparsity, and there is no order. Give a positive one."
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
