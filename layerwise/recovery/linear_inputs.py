"""Inputs of the linears of a layer that is recovered, one linear after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerwise.models.expert_names import expert_linear, kind_of
from layerwise.models.hidden_states import batches
from layerwise.recovery.pruned_layer import LayerToRecover


class LinearInputs:
    """Inputs of the linears for the calibration windows in the pruned or in the dense model, computed batch by batch.

    Every linear needs a pass through the layer up to it, because the linears before it have new weights by then. Attention
    is computed only once: the input of its last linear is kept for the passes to the linears behind it.

    Args:
        hidden_states: states before the layer, shape ``(windows, seqlen, layout.size)``.
        block: the layer's first block, whose last linear's input is kept; None to compute everything in every pass.
        room: takes the kept inputs; contiguous, same shape as ``hidden_states``. They are not kept if they are wider.
    """

    def __init__(
        self, pruned: LayerToRecover, hidden_states: Tensor, block: FirstBlock | None, room: Tensor
    ) -> None:
        self._pruned, self._block = pruned, block
        self._states = batches(hidden_states)
        self._kept: dict[int, Tensor] = {}  # by batch
        self._rooms = batches(room)

    def __len__(self) -> int:
        return len(self._states)

    def of(self, names: Sequence[str], batch: int) -> Tensor:
        """Return the input that the named linears share, computed with the layer's current weights.

        Call it for the groups of ``refitted_together`` in their order, for every batch before the next group.
        """
        (inputs,) = self.of_several([names], batch)
        block, room = self._block, self._rooms[batch].view(-1)[: inputs.numel()]
        fits = inputs.is_contiguous() and room.numel() == inputs.numel() and room.dtype == inputs.dtype
        if block is not None and block.name in names and fits:
            # Stored as it is laid out: a product can have other bits for another layout.
            self._kept[batch] = room.view(inputs.shape).copy_(inputs)
        return inputs

    def of_several(self, groups: Sequence[Sequence[str]], batch: int) -> list[Tensor]:
        """Return the inputs of several groups of linears, each with an input of its own, from one pass."""
        with self.from_kept(batch, len(self._states[batch])):
            return _inputs_of(self._pruned, [names[0] for names in groups], self._states[batch])

    def from_kept(self, batch: int, windows: int) -> AbstractContextManager[None]:
        """Within the block of code, let the layer compute its first block from the kept input, if there is one.

        Args:
            windows: number of windows of the pass. Only a pass of the same shape has the same bits.
        """
        kept = self._kept.get(batch)
        if self._block is None or kept is None or len(kept) != windows:
            return nullcontext()
        return self._block.from_last_input(kept.to(self._pruned.model.device))


@dataclass(frozen=True)
class FirstBlock:
    """A direct submodule of a layer that returns the output of its last linear, such as ``self_attn`` with ``o_proj``.

    As soon as the linears before the last one have their new weights, the input of the last one does not change any more.
    From this input, the block's output has the same bits as from the input of the block.

    Attributes:
        module: the block.
        last: its last linear.
        name: name of the last linear in the layer.
        others: what the block returns after the output; None if it does not return a tuple.
    """

    module: nn.Module
    last: nn.Module
    name: str
    others: tuple[None, ...] | None

    @contextmanager
    def from_last_input(self, inputs: Tensor) -> Iterator[None]:
        """Compute only the last linear in the block, from its ``inputs``, whatever the input of the block is."""

        def compute(*arguments: object, **named: object) -> Tensor | tuple[Tensor | None, ...]:
            output = self.last(inputs)
            return output if self.others is None else (output, *self.others)

        forward = self.module.forward
        self.module.forward = compute
        try:
            yield
        finally:
            self.module.forward = forward


@torch.no_grad()
def find_first_block(pruned: LayerToRecover) -> FirstBlock | None:
    """Return the first direct submodule with linears to recover, if it returns the output of one of them and no more.

    None for a layer without such a block, for example if attention also returns its weights, and for a layer whose
    attention stores its keys and values for later layers.
    """
    if pruned.model.stores(pruned.index):
        return None
    names = [each.linear.name for each in pruned.linears]
    for child, module in pruned.layer.named_children():
        if child in names:  # the layer itself calls its first linear, as XGLM's MLP
            return None
        if inside := [name for name in names if name.startswith(f"{child}.")]:
            return _as_first_block(pruned, module, inside)
    return None


def _as_first_block(pruned: LayerToRecover, module: nn.Module, linears: list[str]) -> FirstBlock | None:
    outputs: dict[str, tuple[Tensor, int]] = {}  # with the version, which changes if the tensor is written to
    found: list[FirstBlock] = []

    def note_output(name: str) -> RemovableHandle:
        def note(linear: nn.Module, inputs: object, output: Tensor) -> None:
            outputs[name] = output, output._version

        return pruned.layer.get_submodule(name).register_forward_hook(note)

    def compare(block: nn.Module, inputs: object, output: object) -> None:
        first, *others = output if isinstance(output, tuple) else (output,)
        rest = (None,) * len(others) if isinstance(output, tuple) else None
        for name, (each, version) in outputs.items():
            if each is first and each._version == version and all(other is None for other in others):
                found.append(FirstBlock(module, pruned.layer.get_submodule(name), name, rest))

    hooks = [*map(note_output, linears), module.register_forward_hook(compare)]
    try:
        pruned.run(pruned.hidden_states[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if len(found) == 1 else None


class _Reached(Exception):
    """All wanted linears were called, so the rest of the layer need not be computed."""


def _inputs_of(pruned: LayerToRecover, names: Sequence[str], hidden_states: Tensor) -> list[Tensor]:
    """Return the inputs of some linears for these hidden states."""
    caught: dict[str, Tensor] = {}

    def watch(name: str) -> RemovableHandle:
        def catch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            caught[name] = inputs[0]
            if len(caught) == len(names):
                raise _Reached

        return pruned.layer.get_submodule(name).register_forward_pre_hook(catch)

    hooks = [watch(name) for name in names]
    try:
        pruned.run(hidden_states)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [caught[name] for name in names]


def refitted_together(groups: Sequence[Sequence[str]]) -> list[list[Sequence[str]]]:
    """Collect the groups of ``linears_by_input`` whose inputs one pass gives: the same linears of all experts of a layer.

    The inputs of an expert do not depend on the other experts. All other groups are alone, in their order. Those of experts
    keep the order that they have in every expert, also if an expert lacks some, because they are not pruned.
    """
    sets: dict[object, list[Sequence[str]]] = {}
    before: dict[str, int] = {}  # groups of each expert so far
    places: dict[object, int] = {}  # last place of a set among the groups of an expert
    for names in groups:
        place = expert_linear(names[0])
        if place is None:
            sets[tuple(names)] = [names]
            continue
        kinds = tuple(map(kind_of, names))
        sets.setdefault(kinds, []).append(names)
        places[kinds] = max(places.get(kinds, 0), before.get(place.name, 0))
        before[place.name] = before.get(place.name, 0) + 1
    of_experts = iter(sorted(places, key=places.__getitem__))
    return [sets[next(of_experts) if kinds in places else kinds] for kinds in sets]


def linears_by_input(pruned: LayerToRecover) -> list[list[str]]:
    """Group the linears to recover by their input tensor, in the order in which the layer calls them.

    Raises:
        ValueError: the layer calls a linear twice, so that it has no single input.
    """
    groups: list[tuple[Tensor, int, list[str]]] = []  # keeps the tensors, so that no id is used twice

    def watch(name: str) -> object:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tensor = inputs[0]
            if any(name in names for _, _, names in groups):
                raise ValueError(
                    f"layer {pruned.index} calls {name} twice in one pass, so it has no single input to be refitted "
                    f"on. Exclude it (--exclude '{name}'), or search without recovery."
                )
            for other, version, names in groups:
                if other is tensor and version == tensor._version:
                    names.append(name)
                    return
            groups.append((tensor, tensor._version, [name]))

        return pruned.layer.get_submodule(name).register_forward_pre_hook(note)

    hooks = [watch(each.linear.name) for each in pruned.linears]
    try:
        pruned.run(pruned.hidden_states[:1])
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]
    return [names for _, _, names in groups]
