"""Modules that stand in for decoder layers while the model's own forward pass runs around them."""

from typing import Any

import torch
from torch import Tensor, nn

LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]


class OtherShape(Exception):
    """A layer got hidden states of another shape: the model takes the first entry of what a layer returns."""


class ExtraOutput:
    """Stands for what a layer returns besides its hidden states; the stand-ins do not have it."""


class ExtraOutputUsed(Exception):
    """A layer is called with what another one returned besides its hidden states."""


class LastLayerReached(Exception):
    """All layers were called: norm and head need not be computed."""


class Recorder(nn.Module):
    """Stands in for a decoder layer: remembers how it is called and passes the hidden states on.

    Args:
        outputs: how many entries the tuple has that it returns; 0: the hidden states alone.
    """

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], outputs: int, last: bool) -> None:
        super().__init__()
        self.layer = [layer]  # in a list, so that it is not registered as a submodule
        self.shape, self.outputs, self.last = shape, outputs, last
        self.hidden_states: Tensor | None = None
        self.arguments: LayerArguments | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        if tuple(hidden_states.shape[:-1]) != self.shape:
            raise OtherShape
        if any(isinstance(argument, ExtraOutput) for argument in (*args, *kwargs.values())):
            raise ExtraOutputUsed
        self.hidden_states, self.arguments = hidden_states, (args, kwargs)
        if self.last:
            raise LastLayerReached
        return as_output(hidden_states, self.outputs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer[0], name)  # e.g. attention_type, by which some models choose the mask


class Injector(nn.Module):
    """Stands in for all decoder layers: returns the hidden states it was given."""

    def __init__(self, hidden_states: Tensor, outputs: int) -> None:
        super().__init__()
        self.hidden_states, self.outputs = hidden_states, outputs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        return as_output(self.hidden_states, self.outputs)


def as_output(hidden_states: Tensor, outputs: int) -> Tensor | tuple[Any, ...]:
    """Hidden states in the form that a layer returns them: a tuple with ``outputs`` entries, or alone if 0."""
    return (hidden_states, *(ExtraOutput() for _ in range(outputs - 1))) if outputs else hidden_states


def same_arguments(known: Any, other: Any) -> bool:
    """Whether two recorded arguments have the same values; objects that are not plain count as the same."""
    if isinstance(known, Tensor):
        return isinstance(other, Tensor) and torch.equal(known, other)
    if isinstance(known, dict):
        return all(same_arguments(value, other.get(name)) for name, value in known.items())
    if isinstance(known, list | tuple):
        return all(map(same_arguments, known, other))
    return True
