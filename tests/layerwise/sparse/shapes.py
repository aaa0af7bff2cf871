"""Weights for comparing the kernel with dense products, and the comparison."""

from collections.abc import Iterator

import torch
from torch import Tensor

from layerwise.sparse.bitmask import pack
from layerwise.sparse.bitmask_linear import multiply_in_blocks
from layerwise.sparse.native import LEVELS, Kernel
from layerwise.sparse.panel_weight import PANEL_COLUMNS, PanelWeight, panels_of

# Single numbers, odd sizes, exact multiples of every step (8, 16, 32, 64), two groups of 64 and a remainder, two and
# three panels.
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
TOKENS = (0, 1, 2, 3, 7, 8, 16, 17)  # all numbers that the kernel processes at a time, and sums of them
DTYPES = (torch.bfloat16, torch.float32)


def sparse_weight(shape: tuple[int, int], sparsity: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random weights of which about ``sparsity`` are zero; if it is above 0, the first and last row are empty."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1])
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < sparsity] = 0
    if sparsity and shape[0] > 2:
        weight[[0, -1]] = 0
    return weight.to(dtype)


def every_weight(dtype: torch.dtype) -> Iterator[tuple[PanelWeight, Tensor]]:
    """Yield weights of all shapes and sparsities, with float and int8 values, and their dense form."""
    for shape in SHAPES:
        for sparsity in SPARSITIES:
            weight = sparse_weight(shape, sparsity, dtype)
            yield panels_of(pack(weight)), weight
            in_steps = panels_of(pack(weight), int8=True)
            yield in_steps, in_steps.dense()


def check_products(kernel: Kernel, weight: PanelWeight, dense: Tensor, dtype: torch.dtype) -> None:
    """Compare the kernel and the dense blocks with float64, for every number of tokens."""
    for tokens in TOKENS:
        generator = torch.Generator().manual_seed(tokens)
        inputs = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
        bias = torch.randn(weight.shape[0], generator=generator).to(dtype)
        # With int8, the kernel may round inputs to 32767 steps on either side of zero of a token's largest input.
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
    """Require that ``outputs`` equal the product up to the rounding of float32 sums and of their dtype.

    The error of a sum of n float32 numbers is at most n roundings (2**-24) of the sum of their magnitudes.

    Args:
        rounded_by: allowed error of every input, shape ``(tokens, 1)``.
        twice: whether the product may have been rounded once more, before scale and bias.
    """
    offset = 0 if bias is None else bias.double()
    exact = inputs.double() @ dense.double().T + offset
    sizes = inputs.double().abs() @ dense.double().abs().T + abs(offset)
    terms = min(inputs.shape[1], 1000) + 4  # with more terms, rounding errors cancel
    rounding = 2.0**-8 if outputs.dtype == torch.bfloat16 else 2.0**-24
    allowed = sizes * terms * 2.0**-24 + exact.abs() * rounding * 1.01
    allowed += (exact - offset).abs() * rounding * 1.01 * twice
    allowed += rounded_by * dense.double().abs().sum(dim=1) * 1.01
    assert outputs.dtype == inputs.dtype
    assert outputs.shape == exact.shape
    assert bool(((outputs.double() - exact).abs() <= allowed).all())
