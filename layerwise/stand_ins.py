"""Modules that stand in for decoder layers while the model's own forward pass runs around them."""

from typing import Any

import torch
from torch import Tensor, nn

LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]


class OtherShape(Exception):
    """A layer got hidden states of another shape: the model takes the first entry of what a layer returns."""


class LastLayerReached(Exception):
    """All layers were called: norm and head need not be computed."""


class Recorder(nn.Module):
    """Stands in for a decoder layer: remembers how it is called and passes the hidden states on."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], in_tuple: bool, last: bool) -> None:
        super().__init__()
        self.layer = [layer]  # in a list, so that it is not registered as a submodule
        self.shape, self.in_tuple, self.last = shape, in_tuple, last
        self.hidden_states: Tensor | None = None
        self.arguments: LayerArguments | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        if tuple(hidden_states.shape[:-1]) != self.shape:
            raise OtherShape
        self.hidden_states, self.arguments = hidden_states, (args, kwargs)
        if self.last:
            raise LastLayerReached
        return (hidden_states,) if self.in_tuple else hidden_states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer[0], name)  # e.g. attention_type, by which some models choose the mask


class Injector(nn.Module):
    """Stands in for all decoder layers: returns the hidden states it was given."""

    def __init__(self, hidden_states: Tensor, in_tuple: bool) -> None:
        super().__init__()
        self.hidden_states, self.in_tuple = hidden_states, in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        return (self.hidden_states,) if self.in_tuple else self.hidden_states


def same_arguments(known: Any, other: Any) -> bool:
    """Whether two recorded arguments have the same values; objects that are not plain count as the same."""
    if isinstance(known, Tensor):
        return isinstance(other, Tensor) and torch.equal(known, other)
    if isinstance(known, dict):
        return all(same_arguments(value, other.get(name)) for name, value in known.items())
    if isinstance(known, list | tuple):
        return all(map(same_arguments, known, other))
    return True
