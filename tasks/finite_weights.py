"""Weights that are NaN or infinite: refused when a checkpoint is imported, while every byte is read anyway."""

import math

import torch
from torch import Tensor


def require_finite(weight: Tensor, name: str, place: str) -> None:
    """Refuse a weight that cannot be ranked, and from which nothing but NaN comes out of a model.

    Args:
        weight: all or a part of it; any shape and dtype.
        name: of the tensor.
        place: what errors call the file.

    Raises:
        ValueError: naming the tensor.
    """
    if not weight.is_floating_point() or not weight.numel():
        return
    # One pass without a copy, about as fast as the checksum; ``isfinite`` takes 20 to 100 times as long.
    least, largest = (float(bound) for bound in torch.aminmax(weight))
    if math.isfinite(least) and math.isfinite(largest):
        return
    kind = "NaN" if math.isnan(least) or math.isnan(largest) else "infinity"
    raise ValueError(
        f"{name} in {place} holds {kind}: the checkpoint was damaged when it was trained, merged or converted "
        "(float16 ends at 65,504). Save the model again from where it is whole, in bfloat16 or float32."
    )
