"""Open a checkpoint as a model that runs one layer at a time."""

from collections.abc import Sequence

import torch

from layerwise.skeleton import Linear, build_skeleton, linears_of
from layerwise.streaming import StreamedModel
from tasks.checkpoint import Checkpoint
from tasks.checkpoint_index import CheckpointIndex
from tasks.execution import Execution
from tasks.model_config import config_from_document

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def streamed_model(checkpoint: Checkpoint, dtype: str, execution: Execution) -> StreamedModel:
    """The model of ``checkpoint`` without its decoder layers, computing in ``dtype``, e.g. "bfloat16"."""
    return StreamedModel(checkpoint.config, checkpoint.outer(), DTYPES[dtype], execution.torch_device)


def linears_by_layer(index: CheckpointIndex) -> list[tuple[Linear, ...]]:
    """The prunable weights of every decoder layer, in the order of ``StreamedModel.linears``."""
    model = build_skeleton(config_from_document(index.config, "the checkpoint"))
    return [linears_of(layer) for layer in model.get_submodule(index.layer_prefix).children()]


def layer_sizes_of(linears: Sequence[Sequence[Linear]]) -> list[int]:
    """Number of prunable weights of every decoder layer."""
    return [sum(linear.numel for linear in layer) for layer in linears]
