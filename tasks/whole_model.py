"""A checkpoint as one model of transformers with all its weights in memory."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from layerwise.skeleton import build_skeleton
from tasks.checkpoint import Checkpoint
from tasks.execution import Execution
from tasks.streamed import DTYPES


def whole_model(checkpoint: Checkpoint, dtype: str, execution: Execution) -> PreTrainedModel:
    """The model of ``checkpoint``, computing in ``dtype``; its tensors are those that a streamed model reads.

    Raises:
        Corrupt: if a tensor is not the one that was imported.
    """
    wanted, device = DTYPES[dtype], execution.torch_device
    model = build_skeleton(checkpoint.config)
    weights = {
        name: tensor.to(device, wanted)
        for name, tensor in checkpoint.read(checkpoint.outer_tensors()).items()
    }
    for index, layer in enumerate(checkpoint.layers()):
        for name, tensor in layer.items():  # copied: the next layer but one is read into the same memory
            weights[f"{checkpoint.layer_prefix}.{index}.{name}"] = tensor.to(device, wanted, copy=True)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not meta, f"an imported checkpoint has every tensor of the model, but {meta} stayed without"
    return model.requires_grad_(False).eval()


def model_of_weights(
    weights: Mapping[str, Tensor], config: PretrainedConfig, source: str, dtype: torch.dtype | Literal["auto"]
) -> PreTrainedModel:
    """The model that transformers makes of a whole checkpoint's tensors, on the CPU.

    Args:
        source: what the error calls the checkpoint.
        dtype: of the model; "auto" is that of the weights.

    Raises:
        ValueError: weights are missing.
    """
    model_class: Any = type(build_skeleton(deepcopy(config)))
    model, found = model_class.from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(
            f"{source} has no weights for {sorted(found['missing_keys'])}, which transformers would have filled with "
            "random ones. Copy all of its files again from one place."
        )
    assert isinstance(model, PreTrainedModel)
    return model
