"""Open a checkpoint as a model that runs one layer at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from layerwise.models.experts import fused_tensors
from layerwise.models.prunable_linears import prunable_linears
from layerwise.models.skeleton import Linear, require_positions
from layerwise.models.streaming import StreamedModel
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.checkpoint_index import CheckpointIndex
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.sources.model_config import config_from_document, outline_from_document

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def streamed_model(checkpoint: Checkpoint, dtype: str, execution: Execution) -> StreamedModel:
    """Open ``checkpoint`` without its decoder layers, computing in ``dtype``, e.g. "bfloat16"."""
    outer = OuterTensors(checkpoint)
    return StreamedModel(checkpoint.config, outer, DTYPES[dtype], execution.torch_device)


def model_of_shapes(
    index: CheckpointIndex, layer: int, dtype: str, device: torch.device
) -> tuple[StreamedModel, dict[str, Tensor]]:
    """Return a model with the shapes of a checkpoint, and random weights of one layer, to measure the time of its passes.

    The weights of the layer share the memory of the largest. Those outside of the layers are zero, and take none.
    """
    computing = DTYPES[dtype]
    nothing = torch.zeros((), dtype=computing, device=device)
    outer = {name: nothing.expand(tensor.entry.shape) for name, tensor in index.outer_tensors().items()}
    config = config_from_document(index.config, "the checkpoint")
    shapes = {name: tensor.entry.shape for name, tensor in index.layer_tensors(layer).items()}
    largest = max(map(math.prod, shapes.values()))
    block = (0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).to(computing)
    values = block.repeat(-(-largest // len(block)))
    model = StreamedModel(config, outer, computing, device)
    experts = fused_tensors(model.layers[layer])
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        weight = values[: math.prod(shape)].view(shape)
        weights |= experts[name].split(name, weight) if name in experts else {name: weight}
    return model, weights


class OuterTensors(Mapping[str, Tensor]):
    """Tensors outside of the decoder layers, each read when it is looked up."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._tensors = checkpoint, checkpoint.outer_tensors()

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.read({name: self._tensors[name]})[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # the default of Mapping would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def linears_by_layer(index: CheckpointIndex, seqlen: int) -> list[tuple[Linear, ...]]:
    """Return the prunable linears of every decoder layer, in the order of ``StreamedModel.linears``.

    Raises:
        ValueError: the model does not have positions for windows of ``seqlen`` tokens.
    """
    model = outline_from_document(index.config, "the checkpoint")
    require_positions(model, seqlen)
    return prunable_linears(model)


def layer_sizes_of(linears: Sequence[Sequence[Linear]]) -> list[int]:
    """Return the number of weights of every decoder layer's linears."""
    return [sum(linear.numel for linear in layer) for layer in linears]
