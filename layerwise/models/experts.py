"""Experts of a decoder layer as linears of their own.

transformers keeps the experts of a layer in tensors of three dimensions, with the expert first. Here each expert gets its
own linears, whose weights are views of these tensors: ``experts.3.gate_proj``, ``experts.3.up_proj``, ``experts.3.down_proj``.
Everything that watches or replaces a linear then works for an expert as for any other linear.

There is no code per model family. The classes of experts in transformers declare the layout of their tensors, because
transformers itself computes all of them by the same function (``transformers.integrations.moe``). For every class, the
computation with separate linears is compared with the class's own forward pass on small random weights before it is used.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from layerwise.models.expert_names import expert_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the classes of experts in transformers declare (use_experts_implementation).
DECLARED = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
BIAS = "_bias"  # after the name of a weight
# Sizes of the random experts of a comparison.
SMALL_HIDDEN, SMALL_INTERMEDIATE, SMALL_TOKENS = 4, 3, 7
TOLERANCE = 1e-4  # of float32 results of size 1


@dataclass(frozen=True)
class FusedTensor:
    """A tensor that holds the same parameter of all experts of a layer.

    Attributes:
        shape: shape of the tensor, the number of experts first.
        axis: axis of the outputs in the parameter of one expert.
        parts: parameters of each expert's linears, with their range of outputs, e.g. ``gate_proj.weight`` and
            ``up_proj.weight`` with half of the outputs each.
    """

    shape: tuple[int, ...]
    axis: int
    parts: tuple[tuple[str, int, int], ...]

    def names(self, owner: str) -> Iterator[str]:
        """Yield the names of the parameters, in the order of ``split``."""
        for expert in range(self.shape[0]):
            for part, _, _ in self.parts:
                yield f"{owner}.{expert}.{part}"

    def split(self, owner: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the parameters of all experts as views of ``tensor``, by name.

        Args:
            owner: name of the experts' module, which precedes the names.
        """
        views = (
            of_expert.narrow(self.axis, start, stop - start)
            for of_expert in tensor.unbind(0)
            for _, start, stop in self.parts
        )
        return dict(zip(self.names(owner), views, strict=True))

    def joined(self, owner: str, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor of which ``parameters`` are the parts: the inverse of ``split``, without a copy of views."""
        first = parameters[next(self.names(owner))]
        if (whole := self._seen_through(owner, first, parameters)) is not None:
            return whole
        tensor = first.new_empty(self.shape)
        for name, view in self.split(owner, tensor).items():
            view.copy_(parameters[name])
        return tensor

    def _seen_through(self, owner: str, first: Tensor, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """Return the tensor that ``parameters`` are views of; None if they are not."""
        left = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
        if math.prod(self.shape) > left:
            return None
        strides = torch.empty(self.shape, device="meta").stride()
        whole = first.as_strided(self.shape, strides)
        same = all(
            (view.data_ptr(), view.stride()) == (parameters[name].data_ptr(), parameters[name].stride())
            for name, view in self.split(owner, whole).items()
        )
        return whole if same else None


def fused_tensors(model: nn.Module) -> dict[str, FusedTensor]:
    """Return the tensors of experts in a model (or layer) of transformers, by state-dict name."""
    found = {}
    for name, module in model.named_modules():
        for parameter, fused in _fused_of(module).items():
            found[f"{name}.{parameter}" if name else parameter] = fused
    return found


def _fused_of(module: nn.Module) -> dict[str, FusedTensor]:
    """Return the fused tensors of a module by parameter name; none if it does not hold experts of a known layout."""
    if isinstance(module, SeparateExperts):
        return module.fused
    if not all(hasattr(module, name) for name in DECLARED):
        return {}
    found = {}
    for weight in WEIGHTS:
        for name in (weight, weight + BIAS):
            parameter = module._parameters.get(name)
            if parameter is None:
                continue
            axis = 1 if module.is_transposed and name == weight else 0
            outputs, leaf = parameter.shape[1 + axis], "weight" if name == weight else "bias"
            parts: tuple[tuple[str, int, int], ...] = ((f"{weight}.{leaf}", 0, outputs),)
            if weight == "gate_up_proj" and module.is_concatenated:
                half = outputs // 2
                parts = ((f"gate_proj.{leaf}", 0, half), (f"up_proj.{leaf}", half, outputs))
            found[name] = FusedTensor(tuple(parameter.shape), axis, parts)
    return found


class SeparateExperts(nn.Module):
    """Experts with linears of their own; a class of transformers is the other base of every object.

    A fused module is changed into this class in place, see ``separate_experts``. The experts are its submodules, by number.
    """

    fused: dict[str, FusedTensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of every token's experts.

        Every expert is called, also without tokens, and gets its tokens in their order. The outputs of a token are
        added in the order of ``top_k_index``. So neither depends on the other tokens, apart from the rounding of
        matrix products.

        Args:
            hidden_states: shape ``(tokens, hidden_size)``.
            top_k_index: experts of every token, shape ``(tokens, k)``. The number of experts stands for none.
            top_k_weights: their weights, same shape.
        """
        number, tokens, top_k = len(self._modules_of_experts), *top_k_index.shape
        experts = top_k_index.reshape(-1)
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=number + 1)[: number + 1].cpu().tolist()
        weights = top_k_weights.reshape(-1)
        outputs = []
        for expert, places in zip(self._modules_of_experts, order.split(counts), strict=False):
            output = self._expert_output(expert, hidden_states[places // top_k])
            outputs.append(output * weights[places, None])
        of_pairs = torch.cat(outputs)
        if counts[number]:
            of_pairs = torch.cat((of_pairs, of_pairs.new_zeros(counts[number], of_pairs.shape[1])))
        in_place = torch.empty_like(order)
        in_place[order] = torch.arange(len(order), device=order.device)
        summed = of_pairs[in_place].view(tokens, top_k, -1).sum(dim=1)
        return summed.to(hidden_states.dtype)

    @property
    def _modules_of_experts(self) -> list[nn.Module]:
        return [module for name, module in self._modules.items() if name.isdecimal() and module is not None]

    def _expert_output(self, expert: Any, states: Tensor) -> Tensor:
        own: Any = self  # attributes of the class of transformers
        if not own.has_gate:
            inner = own.act_fn(expert.up_proj(states))
        elif own.is_concatenated:
            inner = own._apply_gate(torch.cat((expert.gate_proj(states), expert.up_proj(states)), dim=-1))
        else:
            inner = own._apply_gate(expert.gate_up_proj(states))
        output: Tensor = expert.down_proj(inner)
        return own.post_expert_norm(output) if own.has_post_expert_norm else output


def separate_experts(model: PreTrainedModel, prefix: str) -> None:
    """Give every expert in the decoder layers linears of its own, on the meta device. Does nothing the second time.

    Args:
        model: a model with known experts, see ``unknown_experts``.
        prefix: name of the list of decoder layers.
    """
    with _garbage_kept():
        for module in list(model.get_submodule(prefix).modules()):
            if not isinstance(module, SeparateExperts) and _fused_of(module):
                _separate(module)


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Disable garbage collection within the block: with 18,432 new linears, it takes most of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def unknown_experts(model: PreTrainedModel, prefix: str) -> str | None:
    """Return the name of a module whose experts cannot be separated; None if there is none.

    Args:
        prefix: name of the list of decoder layers.
    """
    known: list[str] = []
    for name, module in model.get_submodule(prefix).named_modules():
        if _fused_of(module):
            known.append(f"{name}.")
            is_known = isinstance(module, SeparateExperts) or _is_understood(module)
        else:
            in_experts = "experts" in name.split(".") and not f"{name}.".startswith(tuple(known))
            has_weights = any(each.ndim > 1 for each in module.parameters(recurse=False))
            is_known = not in_experts or not has_weights or isinstance(module, nn.Linear)
        if not is_known:
            return f"{prefix}.{name}"
    return None


def has_experts(model: PreTrainedModel, prefix: str) -> bool:
    """Return whether a decoder layer has experts that can be separated, or that are."""
    return any(
        _fused_of(module) or expert_linear(name) is not None
        for name, module in model.get_submodule(prefix).named_modules()
    )


def _separate(module: nn.Module, values: Mapping[str, Tensor] | None = None) -> None:
    """Change a module with fused experts into ``SeparateExperts``.

    Args:
        values: fused tensors by parameter name; None for parameters on the meta device.
    """
    fused = _fused_of(module)
    parameters: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        parameter = module._parameters.pop(name)
        assert parameter is not None, "_fused_of returns existing parameters"
        empty = torch.empty(tensor.shape, dtype=parameter.dtype, device="meta")
        parameters |= tensor.split("", empty if values is None else values[name])
    by_linear: dict[str, dict[str, Tensor]] = {}
    for name, of_linear in parameters.items():
        linear, _, leaf = name[1:].rpartition(".")
        by_linear.setdefault(linear, {})[leaf] = of_linear
    for name, own in by_linear.items():
        number, _, leaf = name.partition(".")
        if number not in module._modules:
            module._modules[number] = nn.Module()
        expert = module._modules[number]
        assert expert is not None, "it was created above"
        expert._modules[leaf] = _linear_of(own["weight"], own.get("bias"), bool(module.is_transposed))
    module.fused = fused  # type: ignore[assignment]
    module.__class__ = _separated_class(type(module))


def _separated_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _separated:
        _separated[cls] = type(f"Separate{cls.__name__}", (SeparateExperts, cls), {})
    return _separated[cls]


_separated: dict[type[nn.Module], type[nn.Module]] = {}


def _linear_of(weight: Tensor, bias: Tensor | None, is_transposed: bool) -> nn.Module:
    """Return a linear with these parameters, without the time that a random initialization takes."""
    kind = _transposed_linear() if is_transposed else nn.Linear
    linear: Any = kind.__new__(kind)
    nn.Module.__init__(linear)
    if is_transposed:
        linear.nx, linear.nf = weight.shape
    else:
        linear.out_features, linear.in_features = weight.shape
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    linear._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear  # type: ignore[no-any-return]


@cache
def _transposed_linear() -> type[nn.Module]:
    """Return Conv1D of transformers, a linear with a weight ``(in_features, out_features)``, with an optional bias."""
    from transformers.pytorch_utils import Conv1D

    def forward(self: Any, states: Tensor) -> Tensor:
        output: Tensor = states @ self.weight
        return output if self.bias is None else output + self.bias

    return type("TransposedLinear", (Conv1D,), {"forward": forward})


_understood: dict[tuple[object, ...], bool] = {}  # by class and layout


def _is_understood(module: nn.Module) -> bool:
    """Return whether separate linears compute what the class of ``module`` computes, on small random weights."""
    key = (type(module), *(getattr(module, name) for name in DECLARED), *sorted(_fused_of(module)))
    if key not in _understood:
        _understood[key] = _same_as_own_forward(module)
    return _understood[key]


@torch.no_grad()
def _same_as_own_forward(module: nn.Module) -> bool:
    eager = getattr(type(module).forward, "__wrapped__", None)  # without the choice of another implementation
    if eager is None:
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    try:
        small = _small_copy(module, random)
        fused = _fused_of(small)
        values = {name: cast(Tensor, small._parameters[name]) for name in fused}
        number, hidden_size = len(values["down_proj"]), fused["down_proj"].shape[1 + fused["down_proj"].axis]
        top_k = min(2, number)
        states = random(SMALL_TOKENS, hidden_size)
        chosen = torch.stack([random(number).topk(top_k).indices for _ in range(SMALL_TOKENS)])
        weights = random(SMALL_TOKENS, top_k)
        expected = eager(small, states, chosen, weights)
        _separate(small, values)
        found = small(states, chosen, weights)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return False  # it has another interface
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _small_copy(module: nn.Module, random: Callable[..., Tensor]) -> nn.Module:
    """Return a copy of a module with experts, with small sizes and random parameters."""
    down = _fused_of(module)["down_proj"]
    hidden, intermediate = down.shape[1 + down.axis], down.shape[2 - down.axis]
    small = {hidden: SMALL_HIDDEN, intermediate: SMALL_INTERMEDIATE, 2 * intermediate: 2 * SMALL_INTERMEDIATE}
    copied = copy(module)
    copied._parameters = {
        name: None
        if each is None
        else nn.Parameter(random(len(each), *(small.get(n, n) for n in each.shape[1:])))
        for name, each in module._parameters.items()
    }
    copied._modules = {name: deepcopy(each) for name, each in module._modules.items()}
    for each in (each for child in copied.children() for each in child.modules()):
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(random(*(small.get(n, n) for n in parameter.shape)))
    for name, value in vars(copied).items():
        if isinstance(value, int) and name.endswith(("_dim", "_size")):
            copied.__dict__[name] = small.get(value, value)
    return copied
