"""Attention offset: different sparsities for attention and MLP within a layer, at an unchanged overall sparsity.

Attention and MLP tolerate different sparsities. LSA found an offset that helps on LLaMA-3 and Qwen and hurts on
LLaMA-2, so offset 0 must remain a candidate.
"""

import re
from collections.abc import Sequence

from layerwise.allocators.budget import fitted

# Names of attention modules: self_attn (LLaMA, OPT...), attn (GPT-2), attention (GPT-NeoX), self_attention (BLOOM,
# Falcon).
ATTENTION = re.compile(r"(^|[._])(attn|attention)([._]|$)")


def is_attention(linear: str) -> bool:
    """Return whether a linear belongs to attention, judged by its name relative to the layer."""
    return ATTENTION.search(linear) is not None


def with_offset(
    layers: Sequence[float],
    offset: float,
    linear_names: Sequence[Sequence[str]],
    linear_sizes: Sequence[Sequence[int]],
    target: float,
) -> tuple[tuple[float, ...], ...]:
    """Return the sparsity of every linear: in each layer, attention's exceeds the MLP's by ``offset``.

    The mean sparsity of a layer stays the same. Values outside [0, 1] are clipped, and all values are then shifted
    until the overall sparsity is ``target`` again.

    Args:
        layers: sparsity of every layer.
        offset: attention's sparsity minus the MLP's; a negative offset removes less from attention.
        linear_names: names of the prunable linears, by layer, relative to the layer.
        linear_sizes: number of weights of every prunable linear, by layer.
        target: overall sparsity, met exactly.

    Raises:
        ValueError: no layer has linears of both kinds.
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
            "no layer has both attention linears and other linears "
            f"({', '.join(linear_names[0]) if linear_names else 'none'}), so an offset would change nothing. "
            "Remove the offsets."
        )
    every = iter(fitted(shares, [size for sizes in linear_sizes for size in sizes], target))
    return tuple(tuple(next(every) for _ in sizes) for sizes in linear_sizes)
