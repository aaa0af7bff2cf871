"""Weights that are NaN or infinite: refused when a checkpoint is imported, while every byte is read anyway."""

from torch import Tensor

from layerwise.models.nan_check import is_finite


def require_finite(weight: Tensor, name: str, place: str) -> None:
    """Refuse a weight that cannot be ranked, and from which nothing but NaN comes out of a model.

    Args:
        weight: all or a part of it; any shape and dtype.
        name: of the tensor.
        place: what errors call the file.

    Raises:
        ValueError: naming the tensor.
    """
    if is_finite(weight):
        return
    kind = "NaN" if weight.isnan().any() else "infinity"
    raise ValueError(
        f"{name} in {place} holds {kind}: the checkpoint was damaged when it was trained, merged or converted "
        "(float16 ends at 65,504). Save the model again from where it is whole, in bfloat16 or float32."
    )
