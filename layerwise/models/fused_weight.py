"""Fused weights of experts in the forward pass of their class: a product with the slice of an expert calls its linear.

The class computes its experts itself, for example by ``linear(states, self.weight[3])`` or ``bmm(states, self.weight)``.
Instead of the tensor it finds a ``FusedWeight``, which knows no other operations than products: any other use of the
weight raises ``NotImplementedError`` or ``AttributeError``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MATRIX_PRODUCTS: tuple[Callable[..., Tensor], ...] = (
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
)
BATCHED_PRODUCTS = (*MATRIX_PRODUCTS, torch.bmm, Tensor.bmm)


class Products(Protocol):
    """Computes the products with the weights of experts."""

    def product(self, weight: str, expert: int, inputs: Tensor, transposed: bool) -> Tensor:
        """Return the outputs of an expert for ``inputs``, shape ``(tokens, in_features)``.

        Args:
            weight: name of the fused weight.
            transposed: whether the slice of the expert is used as ``(in_features, out_features)``.
        """
        ...


@dataclass(frozen=True, eq=False)
class FusedWeight:
    """Stands for a weight of all experts of a layer.

    Attributes:
        products: what computes with it.
        name: name of the weight.
        slices: shape with the number of experts first, ``(experts, rows, columns)``.
        shape: the same, or ``(experts * rows, columns)``.
    """

    products: Products
    name: str
    slices: tuple[int, int, int]
    shape: tuple[int, ...]

    def __getitem__(self, expert: int | Tensor) -> WeightSlice:
        number = int(expert)
        if len(self.shape) != len(self.slices) or not 0 <= number < self.slices[0]:
            raise NotImplementedError(f"{self.name}[{number}] is not the weight of an expert")
        return WeightSlice(self, number)

    def view(self, *sizes: Any) -> FusedWeight:
        if tuple(torch.empty(self.shape, device="meta").view(*sizes).shape) != self.slices:
            raise NotImplementedError(f"{self.name} is not used expert by expert")
        return FusedWeight(self.products, self.name, self.slices, self.slices)

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        if function not in BATCHED_PRODUCTS or kwargs or not isinstance(args[1], cls):
            raise NotImplementedError(f"{function} of a fused weight")
        inputs, fused = args
        if len(fused.shape) != len(fused.slices) or inputs.shape[0] != fused.slices[0] or inputs.ndim != 3:
            raise NotImplementedError(f"{fused.name} is not used expert by expert")
        outputs = []
        for expert, states in enumerate(inputs):
            # A model that computes every expert for every token multiplies the tokens of other experts by zero before.
            (reached,) = states.any(dim=-1).nonzero(as_tuple=True)
            of_expert = fused.products.product(fused.name, expert, states[reached], transposed=True)
            nothing = of_expert.new_zeros(len(states), of_expert.shape[-1])
            outputs.append(nothing.index_copy(0, reached, of_expert))
        return torch.stack(outputs)


@dataclass(frozen=True, eq=False)
class WeightSlice:
    """Stands for the part of a fused weight that belongs to one expert, or for its transpose."""

    fused: FusedWeight
    expert: int
    is_transpose: bool = False

    @property
    def T(self) -> WeightSlice:
        return WeightSlice(self.fused, self.expert, not self.is_transpose)

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        is_linear = function is nn.functional.linear
        if not (is_linear or function in MATRIX_PRODUCTS) or kwargs or len(args) != 2:
            raise NotImplementedError(f"{function} of the weight of an expert")
        inputs, own = args
        if not isinstance(own, cls):
            raise NotImplementedError("the weight of an expert is not the second factor")
        transposed = own.is_transpose if is_linear else not own.is_transpose
        return own.fused.products.product(own.fused.name, own.expert, inputs, transposed)


@dataclass
class RecordedProducts:
    """Computes the products with slices of tensors, and records the use of these.

    Attributes:
        weights: shape ``(experts, rows, columns)``, by name.
        transposed: whether the slices are used as ``(in_features, out_features)``, by name of the weight.
    """

    weights: Mapping[str, Tensor]
    transposed: dict[str, bool] = field(default_factory=dict)
    _calls: dict[int, list[tuple[Tensor, str]]] = field(default_factory=dict)  # by expert

    def product(self, weight: str, expert: int, inputs: Tensor, transposed: bool) -> Tensor:
        if self.transposed.setdefault(weight, transposed) != transposed:
            raise NotImplementedError(f"{weight} is used in two ways")
        self._calls.setdefault(expert, []).append((inputs, weight))
        matrix = self.weights[weight][expert]
        return inputs @ (matrix if transposed else matrix.T)

    @property
    def groups(self) -> list[list[str]]:
        """Names of the weights in the order of their use by an expert; those with the same input are together."""
        groups: list[list[str]] = []
        before: Tensor | None = None
        for inputs, weight in max(self._calls.values(), key=len, default=[]):
            if inputs is before:
                groups[-1].append(weight)
            else:
                groups.append([weight])
            before = inputs
        return groups


@dataclass
class LinearProducts:
    """Computes the products by linears, and remembers which experts were called.

    Attributes:
        linears: the linear of every expert, by name of the fused weight.
        transposed: see ``RecordedProducts``.
        groups: see ``RecordedProducts``.
    """

    linears: Mapping[str, Sequence[nn.Module]]
    transposed: Mapping[str, bool]
    groups: Iterable[Sequence[str]]
    called: set[tuple[str, int]] = field(default_factory=set)

    def product(self, weight: str, expert: int, inputs: Tensor, transposed: bool) -> Tensor:
        if self.transposed[weight] != transposed:
            raise NotImplementedError(f"{weight} is used in two ways")
        self.called.add((weight, expert))
        output: Tensor = self.linears[weight][expert](inputs)
        return output

    def call_others(self) -> None:
        """Call the linears that were not called since the last time, without tokens."""
        for weights in self.groups:
            for expert, linear in enumerate(self.linears[weights[0]]):
                if (weights[0], expert) not in self.called:
                    matrix = linear.weight
                    assert isinstance(matrix, Tensor), "a linear has a weight"
                    nothing = matrix.new_zeros(0, matrix.shape[0 if self.transposed[weights[0]] else 1])
                    for weight in weights:
                        self.linears[weight][expert](nothing)
        self.called.clear()
