"""A model with all weights in memory, split before its final norm: decoder layers, and head.

Training needs both parts with gradients. As in ``layerwise.models.streaming``, the parts are the model's own forward
pass with some of its decoder layers replaced, so there is no code per model family.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from layerwise.models.skeleton import layer_prefix
from layerwise.models.streaming import Injector, LastLayerReached

LayerOutput = Tensor | tuple[Any, ...]


class Recomputed(nn.Module):
    """Replacement for a decoder layer that keeps only its input, and runs it again in the backward pass.

    The checkpointing of transformers is not used: it needs the training mode, which also switches on dropout, and its
    interface changed within the supported versions.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> LayerOutput:
        return cast(LayerOutput, checkpoint(self.layer, *args, use_reentrant=False, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)  # e.g. attention_type, which selects the mask


class LastLayer(Recomputed):
    """Replacement for the last decoder layer that runs it, keeps its output, and ends the forward pass."""

    output: LayerOutput | None = None

    def forward(self, *args: Any, **kwargs: Any) -> LayerOutput:
        self.output = self.layer(*args, **kwargs)
        raise LastLayerReached


class SplitModel:
    """The two parts of a model. Both are differentiable, and compute in the dtype of its weights or of autocast.

    Args:
        model: in evaluation mode. Its weights are not copied.
        recompute: whether the backward pass computes the activations of the layers again instead of keeping them.
            The gradients are the same.
    """

    def __init__(self, model: PreTrainedModel, recompute: bool = False) -> None:
        self.model, self._recompute = model, recompute
        self.prefix = layer_prefix(model)
        owner, _, self._leaf = self.prefix.rpartition(".")
        self._owner = model.get_submodule(owner)
        self.layers = cast(nn.ModuleList, getattr(self._owner, self._leaf))
        self._outputs = 0  # number of entries of the tuple that a layer returns; 0: hidden states alone

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Return the output of the last decoder layer.

        Args:
            input_ids: shape ``(windows, seqlen)``.

        Returns:
            Hidden states, shape ``(windows, seqlen, hidden_size)``.
        """
        layers = [Recomputed(layer) for layer in self.layers] if self._recompute else list(self.layers)
        last = LastLayer(layers[-1])
        with self._layers_replaced([*layers[:-1], last]), suppress(LastLayerReached):
            self.model(input_ids=input_ids, use_cache=False)
        assert last.output is not None, "every model that was streamed calls its last layer"
        if isinstance(last.output, Tensor):
            return last.output
        self._outputs = len(last.output)
        return cast(Tensor, last.output[0])

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Apply the model's norm and head to the output of the last decoder layer.

        Call ``hidden_states`` first: it finds out how many values a layer of this model returns.

        Args:
            hidden_states: shape ``(windows, positions, hidden_size)``; any part of the positions.

        Returns:
            Logits, shape ``(windows, positions, vocab_size)``.
        """
        # The injector ignores them. Gemma 4 needs tokens: it looks up other embeddings than those of the input.
        input_ids = hidden_states.new_zeros(hidden_states.shape[:2], dtype=torch.long)
        with self._layers_replaced([Injector(hidden_states, self._outputs, self.layers[0])]):
            return cast(Tensor, self.model(input_ids=input_ids, use_cache=False).logits)

    @contextmanager
    def _layers_replaced(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        setattr(self._owner, self._leaf, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(self._owner, self._leaf, self.layers)
