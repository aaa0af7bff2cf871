"""Weights on which the kernel is compared with dense products, and the comparison."""

from collections.abc import Iterator

import torch
from torch import Tensor

from layerwise.sparse.bitmask import pack
from layerwise.sparse.bitmask_linear import multiply_in_blocks
from layerwise.sparse.native import LEVELS, Kernel
from layerwise.sparse.panel_weight import PANEL_COLUMNS, PanelWeight, panels_of

# Single numbers, odd sizes, exact multiples of every step (8, 16, 32, 64), two groups of 64 and a rest, two and three
# panels.
SHAPES = (
    (1, 1),
    (3, 7),
    (5, 8),
    (17, 33),
    (64, 64),
    (31, 100),
    (128, 256),
    (7, 161),
    (6, PANEL_COLUMNS + 1),
    (5, 13000),
)
SPARSITIES = (0.0, 0.5, 0.9, 1.0)
TOKENS = (0, 1, 2, 3, 7, 8, 16, 17)  # every number that the kernel takes at a time, and sums of them
DTYPES = (torch.bfloat16, torch.float32)


def sparse_weight(shape: tuple[int, int], sparsity: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers of which a random ``sparsity`` is zero; the first and the last row are empty if it is above 0."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1])
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < sparsity] = 0
    if sparsity and shape[0] > 2:
        weight[[0, -1]] = 0
    return weight.to(dtype)


def every_weight(dtype: torch.dtype) -> Iterator[tuple[PanelWeight, Tensor]]:
    """Weights of all shapes and sparsities, with float and int8 values, and what they are with their zeros."""
    for shape in SHAPES:
        for sparsity in SPARSITIES:
            weight = sparse_weight(shape, sparsity, dtype)
            yield panels_of(pack(weight)), weight
            in_steps = panels_of(pack(weight), int8=True)
            yield in_steps, in_steps.dense()


def check_products(kernel: Kernel, weight: PanelWeight, dense: Tensor, dtype: torch.dtype) -> None:
    """The kernel and the dense blocks give what numbers of 64 bits give, for every number of tokens."""
    for tokens in TOKENS:
        generator = torch.Generator().manual_seed(tokens)
        inputs = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
        bias = torch.randn(weight.shape[0], generator=generator).to(dtype)
        # The kernel's own products with int8 may round inputs to 32767 steps of a token's largest, to either side.
        in_steps = kernel.level == LEVELS[-1] and weight.scales is not None and dtype == torch.bfloat16
        largest = inputs.double().abs().amax(dim=1, keepdim=True)
        rounding = largest / 32767 / 2 if in_steps else torch.zeros_like(largest)
        for given in (None, bias):
            require_product(kernel.multiply(weight, inputs, given), inputs, dense, given, rounding)
            in_blocks = multiply_in_blocks(kernel, weight, inputs, given)
            require_product(in_blocks, inputs, dense, given, twice=in_steps)


def require_product(
    outputs: Tensor,
    inputs: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
    rounded_by: Tensor | float = 0.0,
    twice: bool = False,
) -> None:
    """``outputs`` are the product as far as their dtype can tell, and sums of float32.

    A sum of n float32 numbers is wrong by at most n roundings (2**-24) of the sum of their sizes.

    Args:
        rounded_by: how far every input may be from what was multiplied, shape ``(tokens, 1)``.
        twice: the product may have been rounded once more, before its scale and bias.
    """
    offset = 0 if bias is None else bias.double()
    exact = inputs.double() @ dense.double().T + offset
    sizes = inputs.double().abs() @ dense.double().abs().T + abs(offset)
    terms = min(inputs.shape[1], 1000) + 4  # beyond, roundings cancel each other
    rounding = 2.0**-8 if outputs.dtype == torch.bfloat16 else 2.0**-24
    allowed = sizes * terms * 2.0**-24 + exact.abs() * rounding * 1.01
    allowed += (exact - offset).abs() * rounding * 1.01 * twice
    allowed += rounded_by * dense.double().abs().sum(dim=1) * 1.01
    assert outputs.dtype == inputs.dtype
    assert outputs.shape == exact.shape
    assert bool(((outputs.double() - exact).abs() <= allowed).all())
