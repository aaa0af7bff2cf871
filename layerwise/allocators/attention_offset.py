"""Attention and MLP apart: the one loses more than its layer's share, the other less, and the budget stays.

Attention and MLP differ in how much they bear (LSA finds a split that helps on LLaMA-3 and Qwen and hurts on
LLaMA-2, so no split must stay a candidate).
"""

import re
from collections.abc import Sequence

from layerwise.allocators.budget import fitted

# The module that holds a layer's attention: self_attn (LLaMA, OPT...), attn (GPT-2), attention (GPT-NeoX),
# self_attention (BLOOM, Falcon).
ATTENTION = re.compile(r"(^|[._])(attn|attention)([._]|$)")


def is_attention(linear: str) -> bool:
    """Whether a linear belongs to its layer's attention, by its name relative to the layer."""
    return ATTENTION.search(linear) is not None


def with_offset(
    layers: Sequence[float],
    offset: float,
    linear_names: Sequence[Sequence[str]],
    linear_sizes: Sequence[Sequence[int]],
    target: float,
) -> tuple[tuple[float, ...], ...]:
    """Sparsity of every linear: in each layer attention's is higher than the MLP's by ``offset``, the mean unchanged.

    Where that would leave [0, 1], it is clipped, and all are shifted until the overall target is met again.

    Args:
        layers: sparsity of every layer.
        offset: attention's sparsity minus the MLP's; negative spares attention.
        linear_names: of the prunable linears, by layer, relative to it.
        linear_sizes: their numbers of weights.
        target: overall sparsity, met exactly.

    Raises:
        ValueError: no layer has linears of both kinds, so that nothing could be told apart.
    """
    shares: list[float] = []
    both = False
    for sparsity, names, sizes in zip(layers, linear_names, linear_sizes, strict=True):
        attention = [is_attention(name) for name in names]
        inside = sum(size for size, inner in zip(sizes, attention, strict=True) if inner)
        part = inside / max(sum(sizes), 1)
        both = both or 0 < part < 1
        shares += [sparsity + offset * ((1 - part) if inner else -part) for inner in attention]
    if not both:
        raise ValueError(
            f"no layer has linears of attention and others ({', '.join(linear_names[0]) if linear_names else 'none'}): "
            "an offset would change nothing. Leave the offsets out."
        )
    every = iter(fitted(shares, [size for sizes in linear_sizes for size in sizes], target))
    return tuple(tuple(next(every) for _ in sizes) for sizes in linear_sizes)
