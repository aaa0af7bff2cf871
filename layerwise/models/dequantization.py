"""Dequantization of weights that are stored as small numbers with a scale for every block of them.

The results equal those of transformers bit for bit. Blocks that do not divide a weight are cut off at its edges, as in
the code of DeepSeek; transformers refuses such a weight, or divides it into smaller blocks.
"""

import torch
from torch import Tensor

POSITIVE_FP4 = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
)  # E2M1, by the lower three bits; the highest is the sign
E8M0_BIAS = 127  # an exponent e of 8 bits stands for 2 ** (e - 127)


def dequantize_fp8(
    weight: Tensor, scales: Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> Tensor:
    """Multiply every block of ``weight`` by its scale, in float32.

    Args:
        weight: float8, shape ``(..., rows, columns)``.
        scales: one per block, shape ``(..., rows of blocks, columns of blocks)``, or a single one for the whole weight;
            uint8 is an exponent (E8M0).
        block: rows and columns of a block; those at the edges may be smaller. None: blocks of equal size.
        dtype: of the result.

    Raises:
        ValueError: the number of scales does not fit the shape of the weight.
    """
    factors = scales.float()
    if scales.dtype == torch.uint8:
        factors = (factors - E8M0_BIAS).exp2()
    if factors.numel() == 1:
        return (weight.float() * factors.reshape(())).to(dtype)
    for axis in (-2, -1):
        size, count = weight.shape[axis], factors.shape[axis]
        if block is not None and -(-size // block[axis]) == count:
            length = block[axis]
        elif size % count == 0:
            length = size // count
        else:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} has scales of shape {tuple(scales.shape)}, which do not divide "
                f"it into blocks{'' if block is None else f' of {block[0]} x {block[1]}'}."
            )
        factors = factors.repeat_interleave(length, axis).narrow(axis, 0, size)
    return weight.float().mul_(factors).to(dtype)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights of all experts of a layer, in the layout of transformers.

    Args:
        blocks: uint8, two numbers per byte (the first in the lower half), shape ``(experts, rows, blocks, bytes)``.
        scales: uint8, exponents of two (E8M0), shape ``(experts, rows, blocks)``.
        dtype: of the result.

    Returns:
        Weights, shape ``(experts, columns, rows)`` with ``columns = 2 * blocks * bytes``.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if blocks.ndim != 4 or scales.shape != blocks.shape[:-1]:
        raise ValueError(
            f"mxfp4 values of shape {tuple(blocks.shape)} have scales of shape {tuple(scales.shape)}, not one for every block."
        )
    values = torch.tensor(
        (*POSITIVE_FP4, *(-value for value in POSITIVE_FP4)), dtype=dtype, device=blocks.device
    )
    experts, rows, count, size = blocks.shape
    weights = torch.empty(experts, 2 * count * size, rows, dtype=dtype, device=blocks.device)
    # One expert at a time: the indices take 8 bytes for each number of half a byte.
    for weight, codes, exponents in zip(weights, blocks, scales, strict=True):
        pairs = torch.stack((values[(codes & 0x0F).long()], values[(codes >> 4).long()]), dim=-1)
        scaled = torch.ldexp(pairs.flatten(-2), exponents.to(torch.int32).unsqueeze(-1) - E8M0_BIAS)
        weight.copy_(scaled.to(dtype).flatten(-2).T)
    return weights
