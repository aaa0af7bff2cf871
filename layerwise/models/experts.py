"""Experts of a decoder layer as linears of their own.

transformers keeps the experts of a layer in tensors of three dimensions, with the expert first. Here each expert gets its
own linears, whose weights are views of these tensors: ``experts.3.gate_proj``, ``experts.3.up_proj``, ``experts.3.down_proj``.
Everything that watches or replaces a linear then works for an expert as for any other linear.

There is no code per model family. Most classes of experts in transformers declare the layout of their tensors, because
transformers itself computes all of them by the same function (``transformers.integrations.moe``); here, too, one function
computes them (``SeparateExperts``). The forward pass of any other class stays as it is, and calls the linears where it
multiplies by the weights (``SlicedExperts``); the layout is recorded in a forward pass. For every class, the computation
with separate linears is compared with the class's own forward pass on small random weights before it is used.
"""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from layerwise.models.expert_names import expert_linear
from layerwise.models.fused_weight import FusedWeight, LinearProducts, Products, RecordedProducts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of the number of experts in transformers' configurations and modules.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
# What the classes of experts in transformers declare (use_experts_implementation).
DECLARED = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
BIAS = "_bias"  # after the name of a weight
POOL = "experts"  # last part of the name of the module that has the experts' linears
SMALL_TOKENS, SMALLEST = 7, 2  # tokens of a comparison, and the smallest size of its random weights
TOLERANCE = 1e-4  # of float32 results of size 1
COUNT_ALL = "Calibrate on all tokens (--calibrate-on all)."
# What a forward pass raises that cannot be run here: it has another interface, or uses the weights in another way.
NOT_RUN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


Shape = tuple[int, int, int]  # experts, rows, columns


@dataclass(frozen=True)
class FusedTensor:
    """A tensor that holds the same parameter of all experts of a layer.

    Attributes:
        shape: shape of the tensor, the number of experts first.
        axis: axis of the outputs in the parameter of one expert.
        parts: parameters of each expert's linears, with their range of outputs, e.g. ``gate_proj.weight`` and
            ``up_proj.weight`` with half of the outputs each.
        levels: number of parts of the tensor's name that the names of the linears do not have, from its end: 1 for
            ``mlp.experts.down_proj``.
        is_flat: whether the first two axes are one in the model.
    """

    shape: tuple[int, ...]
    axis: int
    parts: tuple[tuple[str, int, int], ...]
    levels: int = 1
    is_flat: bool = False

    def names(self, name: str) -> Iterator[str]:
        """Yield the names of the parameters, in the order of ``split``.

        Args:
            name: name of the tensor.
        """
        above = name.split(".")[: -self.levels]
        pool = ".".join(above if above[-1:] == [POOL] else [*above, POOL])
        for expert in range(self.shape[0]):
            for part, _, _ in self.parts:
                yield f"{pool}.{expert}.{part}"

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the parameters of all experts as views of ``tensor``, by name.

        Args:
            name: name of the tensor.
        """
        views = (
            of_expert.narrow(self.axis, start, stop - start)
            for of_expert in tensor.view(self.shape).unbind(0)
            for _, start, stop in self.parts
        )
        return dict(zip(self.names(name), views, strict=True))

    def joined(self, name: str, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor of which ``parameters`` are the parts: the inverse of ``split``, without a copy of views."""
        first = parameters[next(self.names(name))]
        tensor = self._seen_through(name, first, parameters)
        if tensor is None:
            tensor = first.new_empty(self.shape)
            for part, view in self.split(name, tensor).items():
                view.copy_(parameters[part])
        return tensor.flatten(0, 1) if self.is_flat else tensor

    def _seen_through(self, name: str, first: Tensor, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """Return the tensor that ``parameters`` are views of; None if they are not."""
        left = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
        if math.prod(self.shape) > left:
            return None
        strides = torch.empty(self.shape, device="meta").stride()
        whole = first.as_strided(self.shape, strides)
        same = all(
            (view.data_ptr(), view.stride()) == (parameters[part].data_ptr(), parameters[part].stride())
            for part, view in self.split(name, whole).items()
        )
        return whole if same else None


def fused_tensors(model: nn.Module) -> dict[str, FusedTensor]:
    """Return the tensors of experts in a model (or layer) of transformers, by state-dict name."""
    return {
        f"{name}.{parameter}" if name else parameter: fused
        for name, _, tensors in _expert_modules(model)
        for parameter, fused in tensors.items()
    }


def _expert_modules(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, FusedTensor]]]:
    """Return the modules with fused experts: name, module, and fused tensors by name in the module."""
    found: list[tuple[str, nn.Module, dict[str, FusedTensor]]] = []
    inside = set[nn.Module]()
    for name, module in reversed(list(model.named_modules())):  # a module comes after those within it
        fused = _declared_tensors(module) or _sliced_tensors(name, module, inside)
        if fused:
            found.append((name, module, fused))
            inside.update(module.modules())
    return found[::-1]


def _declared_tensors(module: nn.Module) -> dict[str, FusedTensor]:
    """Return the fused tensors of a module by parameter name; none if it does not declare their layout."""
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


def _sliced_tensors(name: str, module: nn.Module, known: Collection[nn.Module]) -> dict[str, FusedTensor]:
    """Return the fused tensors that the forward pass of a module uses expert by expert, by name in the module.

    Args:
        name: name of the module.
        known: modules whose experts are known already.
    """
    if isinstance(module, SlicedExperts):
        return module.fused
    shapes = {} if module in known else _possible_slices(name, module, known)
    uses = _uses_of(module, shapes) if shapes else None
    return {} if uses is None else _tensors_of(name, module, shapes, uses.transposed)


def _tensors_of(
    name: str, module: nn.Module, shapes: Mapping[str, Shape], transposed: Mapping[str, bool]
) -> dict[str, FusedTensor]:
    """Return fused tensors by name in the module; none if two would give an expert linears of the same name."""
    of_module, found = name.split("."), {}
    for path, shape in shapes.items():
        full = [*of_module, *path.split(".")]
        linear = full[-2 if full[-1] == "weight" else -1]
        axis = 1 if transposed[path] else 0
        levels = path.count(".") + (1 if of_module[-1] == POOL else 2)
        is_flat = module.get_parameter(path).ndim < len(shape)
        found[path] = FusedTensor(shape, axis, ((f"{linear}.weight", 0, shape[1 + axis]),), levels, is_flat)
    names = {tensor.parts[0][0] for tensor in found.values()}
    return found if len(names) == len(found) else {}


def _possible_slices(name: str, module: nn.Module, known: Collection[nn.Module]) -> dict[str, Shape]:
    """Return the shapes ``(experts, rows, columns)`` of the parameters in a module that may be weights of experts."""
    from transformers.pytorch_utils import Conv1D

    counts = (vars(module).get(count) for count in EXPERT_COUNTS)
    number = next((count for count in counts if isinstance(count, int) and count > 1), 0)
    found: dict[str, Shape] = {}
    if not number:
        return found
    for path, owner in module.named_modules():
        if owner in known or isinstance(owner, Conv1D) or type(owner).__module__.startswith("torch.nn."):
            continue
        for leaf, parameter in owner._parameters.items():
            if parameter is None or not parameter.numel():
                continue
            rows = parameter.shape[0] // number
            in_one_axis = parameter.ndim == 2 and rows > 1 and POOL in f"{name}.{path}".split(".")
            if in_one_axis and len(parameter) == number * rows:
                found[f"{path}.{leaf}".lstrip(".")] = (number, rows, parameter.shape[1])
            elif parameter.ndim == 3 and len(parameter) == number:
                found[f"{path}.{leaf}".lstrip(".")] = (number, parameter.shape[1], parameter.shape[2])
    return found


@dataclass(frozen=True)
class ReceivedTokens:
    """Tokens that an expert received in its last call.

    Attributes:
        numbers: their numbers among all tokens of the pass, in the order of the rows of the expert's inputs.
        total: number of tokens of the pass.
    """

    numbers: Tensor
    total: int


class SeparateExperts(nn.Module):
    """Experts with linears of their own; a class of transformers is the other base of every object.

    A fused module is changed into this class in place, see ``separate_experts``. The experts are its submodules, by number;
    each has its ``ReceivedTokens`` as ``received``.
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
            received = ReceivedTokens(places // top_k, tokens)
            expert.received = received  # type: ignore[assignment]
            output = self._expert_output(expert, hidden_states[received.numbers])
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


class SlicedExperts(nn.Module):
    """Experts with linears of their own that the forward pass of their class calls, which is the other base.

    A fused module is changed into this class in place, see ``separate_experts``. Every expert is called, also without
    tokens. The linears are submodules of the nearest module that is named "experts", or of a new one.

    Attributes:
        fused: tensors of the experts, by name in the module.
    """

    fused: dict[str, FusedTensor]
    products: LinearProducts

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self.products.called.clear()
        output = super().forward(*arguments, **named)
        self.products.call_others()
        return output


def counted_by(layer: nn.Module, linear: str, counted: Tensor) -> Tensor:
    """Return which rows of a linear's input count: an expert receives a part of the tokens.

    Call it when the linear is called, before the next pass.

    Args:
        linear: name of the linear in ``layer``.
        counted: mask of the tokens of the pass, any shape.

    Returns:
        ``counted`` itself for a linear that every token reaches; else shape ``(rows,)``.

    Raises:
        ValueError: it is not known which tokens the expert received, see ``experts_of_unknown_tokens``.
    """
    place = expert_linear(linear)
    if place is None:
        return counted
    received = getattr(layer.get_submodule(place.name), "received", None)
    if received is None or received.total != counted.numel():
        raise ValueError(f"it is not known which tokens {place.name} received. {COUNT_ALL}")
    return counted.reshape(-1).to(received.numbers.device)[received.numbers]


def experts_of_unknown_tokens(model: PreTrainedModel) -> str | None:
    """Return the name of a module whose experts do not tell which tokens they receive; None if there is none.

    Args:
        model: its experts may be separated or not, see ``separate_experts``.
    """
    modules = _expert_modules(model)
    telling = {name for name, module, _ in modules if _declared_tensors(module)}
    pools = {place.pool for name, _ in model.named_modules() if (place := expert_linear(name)) is not None}
    others = [name for name, _, _ in modules if name not in telling]
    return next(iter([*others, *sorted(pools - telling)]), None)


def separate_experts(model: PreTrainedModel, prefix: str) -> None:
    """Give every expert in the decoder layers linears of its own, on the meta device. Does nothing the second time.

    Args:
        model: a model with known experts, see ``unknown_experts``.
        prefix: name of the list of decoder layers.
    """
    layers = model.get_submodule(prefix)
    with _garbage_kept():
        for name, module, fused in _expert_modules(layers):
            if isinstance(module, SeparateExperts | SlicedExperts):
                continue
            path, tensor = next(iter(fused.items()))
            above, _, _ = next(tensor.names(f"{name}.{path}")).partition(f".{POOL}.")
            _separate(module, fused, _child(layers.get_submodule(above), POOL))


def _child(module: nn.Module, name: str) -> nn.Module:
    """Return a submodule, a new one if there is none."""
    if name not in module._modules:
        module._modules[name] = nn.Module()
    return module.get_submodule(name)


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
    from transformers.pytorch_utils import Conv1D

    layers = model.get_submodule(prefix)
    modules = _expert_modules(layers)
    for name, module, fused in modules:
        separated = isinstance(module, SeparateExperts | SlicedExperts)
        if not separated and _declared_tensors(module) and not _is_understood(module, fused):
            return f"{prefix}.{name}"
    known = tuple(f"{name}." for name, _, _ in modules)
    for name, module in layers.named_modules():
        in_experts = POOL in name.split(".") and not f"{name}.".startswith(known)
        has_weights = any(each.ndim > 1 for each in module.parameters(recurse=False))
        if in_experts and has_weights and not isinstance(module, nn.Linear | Conv1D):
            return f"{prefix}.{name}"
    return None


def has_experts(model: PreTrainedModel, prefix: str) -> bool:
    """Return whether a decoder layer has experts that can be separated, or that are."""
    layers = model.get_submodule(prefix)
    return bool(_expert_modules(layers)) or any(
        expert_linear(name) is not None for name, _ in layers.named_modules()
    )


def _separate(
    module: nn.Module,
    fused: dict[str, FusedTensor],
    pool: nn.Module,
    uses: Uses | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Change a module with fused experts into ``SeparateExperts`` or ``SlicedExperts``.

    Args:
        fused: tensors of the experts by name in the module.
        pool: module that gets the experts' linears as submodules.
        uses: how the module's forward pass uses the tensors; None to find out.
        values: the tensors by name; None for parameters on the meta device.
    """
    is_declared = bool(_declared_tensors(module))
    if uses is None and not is_declared:
        uses = _uses_of(module, {name: _three(tensor.shape) for name, tensor in fused.items()})
    parameters, transposed = dict[str, dict[str, Tensor]](), dict[str, bool]()  # by linear
    for name, tensor in fused.items():
        owner, _, leaf = name.rpartition(".")
        parameter = module.get_submodule(owner)._parameters.pop(leaf)
        assert parameter is not None, "the tensors of experts are existing parameters"
        empty = torch.empty(tensor.shape, dtype=parameter.dtype, device="meta")
        for part, view in tensor.split(name, empty if values is None else values[name]).items():
            linear, _, kind = part.rpartition(".")
            parameters.setdefault(linear, {})[kind] = view
            if kind == "weight":
                transposed[linear] = tensor.axis == 1
    for linear, own in parameters.items():
        place = expert_linear(linear)
        assert place is not None, "a fused tensor gives names of linears of experts"
        expert = _child(pool, str(place.expert))
        expert._modules[place.linear] = _linear_of(own["weight"], own.get("bias"), transposed[linear])
    module.fused = fused  # type: ignore[assignment]
    if uses is not None:
        names = {name: tensor.parts[0][0].removesuffix(".weight") for name, tensor in fused.items()}
        experts = [pool.get_submodule(str(number)) for number in range(next(iter(fused.values())).shape[0])]
        linears = {
            name: [expert.get_submodule(linear) for expert in experts] for name, linear in names.items()
        }
        products = LinearProducts(linears, uses.transposed, uses.groups)
        module.products = products  # type: ignore[assignment]
        _use_products(module, fused, products)
    module.__class__ = _separated_class(SeparateExperts if is_declared else SlicedExperts, type(module))


def _use_products(module: nn.Module, fused: Mapping[str, FusedTensor], products: Products) -> None:
    """Let a module find a ``FusedWeight`` in place of every fused tensor."""
    for name, tensor in fused.items():
        path, _, leaf = name.rpartition(".")
        owner, slices = module.get_submodule(path), _three(tensor.shape)
        owner._parameters.pop(leaf, None)
        shape = (slices[0] * slices[1], slices[2]) if tensor.is_flat else slices
        owner.__dict__[leaf] = FusedWeight(products, name, slices, shape)


_separated: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _separated_class(base: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    if (base, cls) not in _separated:
        name = f"{base.__name__.removesuffix('Experts')}{cls.__name__}"
        _separated[base, cls] = type(name, (base, cls), {})
    return _separated[base, cls]


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


def _is_understood(module: nn.Module, fused: Mapping[str, FusedTensor]) -> bool:
    """Return whether separate linears compute what the class of ``module`` computes, on small random weights."""
    key = (type(module), *(getattr(module, name) for name in DECLARED), *sorted(fused))
    if key not in _understood:
        _understood[key] = _same_as_own_forward(module, fused)
    return _understood[key]


@torch.no_grad()
def _same_as_own_forward(module: nn.Module, fused: Mapping[str, FusedTensor]) -> bool:
    eager = getattr(type(module).forward, "__wrapped__", None)  # without the choice of another implementation
    if eager is None:
        return False
    random = _random_numbers()
    try:
        small = _small_copy(module, {name: tensor.shape for name, tensor in fused.items()}, random)
        tensors = _declared_tensors(small)
        values = {name: cast(Tensor, small._parameters[name]) for name in tensors}
        down = tensors["down_proj"]
        arguments = _routed_tokens(down.shape[0], down.shape[1 + down.axis], random)
        expected = eager(small, *arguments)
        _separate(small, tensors, small, values=values)
        found = small(*arguments)
    except NOT_RUN:
        return False
    return _is_close(found, expected)


@dataclass(frozen=True)
class Uses:
    """Use of the fused tensors of a module in its forward pass, see ``RecordedProducts``."""

    transposed: Mapping[str, bool]
    groups: Sequence[Sequence[str]]


_known_uses: dict[tuple[object, ...], Uses | None] = {}  # by class and shapes


def _uses_of(module: nn.Module, shapes: Mapping[str, Shape]) -> Uses | None:
    """Return how a module uses the weights of its experts; None if it does not use them expert by expert.

    Args:
        shapes: of all weights of the experts, by name in the module.
    """
    key = (type(module), *shapes.items())
    if key not in _known_uses:
        _known_uses[key] = _recorded_uses(module, shapes)
    return _known_uses[key]


@torch.no_grad()
def _recorded_uses(module: nn.Module, shapes: Mapping[str, Shape]) -> Uses | None:
    random, number = _random_numbers(), next(iter(shapes.values()))[0]
    small = _small_copy(module, shapes, random)
    parameters = {name: small.get_parameter(name) for name in shapes}
    values = {name: weight.view(number, -1, weight.shape[-1]) for name, weight in parameters.items()}
    small_shapes = {name: _three(weight.shape) for name, weight in values.items()}
    for arguments in _possible_arguments(number, small_shapes.values(), random):
        products = RecordedProducts(values)
        try:
            expected = small(*arguments)
            recorded = deepcopy(small)
            _use_products(recorded, _tensors_of(POOL, small, small_shapes, defaultdict(bool)), products)
            if not _is_close(recorded(*arguments), expected) or products.transposed.keys() != shapes.keys():
                continue
            uses = Uses(products.transposed, products.groups)
            separated, pool = deepcopy(small), nn.Module()
            fused = _tensors_of(POOL, small, small_shapes, uses.transposed)
            _separate(separated, fused, pool, uses, values)
            found = separated(*arguments)
        except NOT_RUN:
            continue
        if _is_close(found, expected):
            return uses
    return None


def _possible_arguments(
    number: int, shapes: Collection[Shape], random: Callable[..., Tensor]
) -> Iterator[tuple[Any, ...]]:
    """Yield arguments of the forward passes of experts, for every width that their inputs may have.

    Args:
        number: number of experts.
        shapes: of their weights.
    """
    for width in sorted({size for shape in shapes for size in shape[1:]}):
        yield _routed_tokens(number, width, random)
        sizes = [expert % 3 for expert in range(number)]
        yield random(sum(sizes), width), sizes  # the tokens of the first expert, of the second, ...
        every_token = random(number, SMALL_TOKENS, width)
        every_token[:, ::2] = 0  # an expert's input for a token of another expert
        yield (every_token.flatten(0, 1),)


def _routed_tokens(number: int, width: int, random: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, the experts of every token, and their weights."""
    top_k = min(2, number)
    chosen = torch.stack([random(number).topk(top_k).indices for _ in range(SMALL_TOKENS)])
    return random(SMALL_TOKENS, width), chosen, random(SMALL_TOKENS, top_k)


def _is_close(found: object, expected: object) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def _random_numbers() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def _small_copy(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], random: Callable[..., Tensor]
) -> nn.Module:
    """Return a copy of a module with experts, with small sizes in the same ratios, and random parameters.

    Args:
        shapes: of the weights of the experts, with the number of experts first, by name in the module.
    """
    sizes = {size for shape in shapes.values() for size in shape[1:]}
    common = math.gcd(*sizes)
    factors = (factor for factor in range(1, common) if common % factor == 0)
    factor = next((factor for factor in factors if factor * min(sizes) >= SMALLEST * common), common)
    small = {size: size * factor // common for size in sizes}
    # The parameters are not copied.
    copied = deepcopy(module, {id(each): each for each in module.parameters()})
    for path, part in copied.named_modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                name = f"{path}.{leaf}".lstrip(".")
                shape = [small.get(size, size) for size in parameter.shape]
                if name in shapes:
                    number, *rest = shapes[name]
                    shape = [number, *(small[size] for size in rest)]
                    if parameter.ndim < len(shape):
                        shape = [number * shape[1], *shape[2:]]
                part._parameters[leaf] = nn.Parameter(random(*shape))
        for name, value in vars(part).items():
            if isinstance(value, int) and name.endswith(("_dim", "_size")):
                part.__dict__[name] = small.get(value, value)
    return copied


def _three(shape: Sequence[int]) -> Shape:
    experts, rows, columns = shape
    return experts, rows, columns
