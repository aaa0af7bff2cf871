"""Open a checkpoint as one model of transformers with all its weights in memory."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from layerwise.models.skeleton import build_skeleton, with_plain_forward
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import DTYPES
from layerwise.tasks.running.execution import Execution


def whole_model(checkpoint: Checkpoint, dtype: str, execution: Execution) -> PreTrainedModel:
    """The model of ``checkpoint``, computing in ``dtype``; its tensors are those that a streamed model reads.

    Raises:
        Corrupt: if a tensor is not the one that was imported.
    """
    wanted, device = DTYPES[dtype], execution.torch_device
    weights = {
        name: tensor.to(device, wanted)
        for name, tensor in checkpoint.read(checkpoint.outer_tensors()).items()
    }
    for index, layer in enumerate(checkpoint.layers()):
        for name, tensor in layer.items():  # copied: the next layer but one is read into the same memory
            weights[f"{checkpoint.layer_prefix}.{index}.{name}"] = tensor.to(device, wanted, copy=True)
    return model_of_weights(checkpoint.config, weights, device)


def model_of_weights(
    config: PretrainedConfig, weights: Mapping[str, Tensor], device: torch.device
) -> PreTrainedModel:
    """The model of ``config`` with these weights, for inference.

    Args:
        weights: all that the model has, tied ones once, by their state-dict names, on ``device``.
    """
    model = build_skeleton(with_plain_forward(config))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not meta, f"a checked checkpoint has every tensor of the model, but {meta} stayed without"
    return model.requires_grad_(False).eval()
