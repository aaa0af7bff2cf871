"""Open a checkpoint as one transformers model with all weights in memory."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from layerwise.models.skeleton import build_skeleton, fill_unused_parts, with_plain_forward
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import DTYPES
from layerwise.tasks.running.execution import Execution


def whole_model(checkpoint: Checkpoint, dtype: str, execution: Execution) -> PreTrainedModel:
    """Open ``checkpoint``, computing in ``dtype``, with the same tensors as a streamed model.

    Raises:
        Corrupt: a tensor differs from the one that was imported.
    """
    wanted, device = DTYPES[dtype], execution.torch_device
    weights = {
        name: tensor.to(device, wanted)
        for name, tensor in checkpoint.read(checkpoint.outer_tensors()).items()
    }
    for index, layer in enumerate(checkpoint.layers()):
        for name, tensor in layer.items():  # copied, because the buffer is reused for a later layer
            weights[f"{checkpoint.layer_prefix}.{index}.{name}"] = tensor.to(device, wanted, copy=True)
    return model_of_weights(checkpoint.config, weights, device)


def model_of_weights(
    config: PretrainedConfig, weights: Mapping[str, Tensor], device: torch.device
) -> PreTrainedModel:
    """Build the model of ``config`` with these weights, for inference on text.

    The image and sound encoders of a multimodal model have no values and take no memory.

    Args:
        weights: all weights of the model on ``device``, by state-dict name; tied weights once.
    """
    model = build_skeleton(with_plain_forward(config))
    fill_unused_parts(model, next(iter(weights.values())).dtype, device)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not meta, f"a checked checkpoint has every tensor of the model, but {meta} have no values"
    return model.requires_grad_(False).eval()
