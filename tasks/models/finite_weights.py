"""Refusal of weights that are NaN or infinite. An import checks all weights, because it reads every byte anyway."""

from torch import Tensor

from layerwise.models.nan_check import is_finite


def require_finite(weight: Tensor, name: str, place: str) -> None:
    """Refuse a weight with NaN or infinity: it cannot be ranked, and the output of its model is NaN.

    Args:
        weight: a weight or a part of it; any shape and dtype.
        name: name of the tensor.
        place: name of the file, for errors.

    Raises:
        ValueError: the weight holds NaN or infinity; the message names the tensor.
    """
    if is_finite(weight):
        return
    kind = "NaN" if weight.isnan().any() else "infinity"
    raise ValueError(
        f"{name} in {place} holds {kind}: the checkpoint was damaged when it was trained, merged or converted "
        "(the largest float16 is 65,504). Save the model again from an undamaged copy, in bfloat16 or float32."
    )
