"""Prune the linears of one decoder layer, for several lanes after each other or for one export.

There are two kinds of pruners. A ``MaskPruner`` (magnitude, Wanda) says which weights go; the masks of rising
sparsities are nested, so that one ranking serves all lanes and the weights are zeroed in place. A ``WeightPruner``
(SparseGPT, ALPS) corrects the weights that stay, by the second moments of their inputs: each lane gets weights of its
own, but what depends on the inputs alone is computed once for all lanes and all linears that share them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.calibration.gram import InputGram
from layerwise.calibration.statistics import InputStatistics
from layerwise.models.skeleton import Linear

GramsByInput = Iterable[tuple[Sequence[str], InputGram]]
LayerInputs = Mapping[str, InputStatistics] | GramsByInput


@runtime_checkable
class MaskPruner(Protocol):
    """Says in which order the weights of a linear go; see ``wanda.Wanda.removal_levels``."""

    @property
    def method(self) -> str: ...

    def removal_levels(
        self, weight: Tensor, inputs: InputStatistics, counts: Sequence[int], group: int | None = None
    ) -> Tensor: ...


@runtime_checkable
class WeightPruner(Protocol):
    """Removes weights of a linear and corrects the others; see ``sparsegpt.SparseGPT``."""

    @property
    def method(self) -> str: ...

    def prepare(self, gram: Tensor, tokens: int) -> Any: ...

    def prune(self, weight: Tensor, prepared: Any, count: int, group: int | None = None) -> Tensor: ...


Pruner = MaskPruner | WeightPruner


class LinearPruning(Protocol):
    """Brings one weight, in place, to what it is in one lane after the other."""

    def visit(self, lane: int) -> None: ...


def prunings_of_layer(
    pruner: Pruner,
    index: int,
    linears: Sequence[Linear],
    parameters: Sequence[Tensor],
    stored: Mapping[str, Tensor],
    inputs: LayerInputs,
    counts: Sequence[Sequence[int]],
    group: int | None,
) -> list[LinearPruning]:
    """One for each linear; the lanes are to be visited by rising sparsity of the layer.

    Args:
        index: of the layer, for messages.
        parameters: weight of every linear as the model computes with it, ``(out_features, in_features)``.
        stored: weights by name as the checkpoint has them: these are ranked and pruned, as they will be in an export;
            casting could make ties of different ones.
        inputs: what calibration saw; statistics by linear for a ``MaskPruner``, else Gram matrices.
        counts: by linear: weights to remove in each visited lane. A linear that loses none in any is left alone.
        group: M of an N:M pattern; None for none.

    Raises:
        ValueError: a linear that cannot be pruned in this way; says which.
    """
    touched = [number for number, wanted in enumerate(counts) if any(wanted)]
    linears, parameters, counts = (
        [linears[number] for number in touched],
        [parameters[number] for number in touched],
        [counts[number] for number in touched],
    )
    originals = [
        linear.oriented(stored[linear.weight_name]).to(parameter.device)
        for linear, parameter in zip(linears, parameters, strict=True)
    ]
    if isinstance(pruner, MaskPruner):
        assert isinstance(inputs, Mapping), "masks are found by statistics"
        return [
            _zeroing(pruner, index, linear, parameter, original, inputs[linear.name], wanted, group)
            for linear, parameter, original, wanted in zip(
                linears, parameters, originals, counts, strict=True
            )
        ]
    assert not isinstance(inputs, Mapping), "weights are corrected by Gram matrices"
    device = parameters[0].device if parameters else torch.device("cpu")
    prepared = _prepared(pruner, index, inputs, {linear.name for linear in linears}, device)
    return [
        _Replacing(
            pruner,
            index,
            linear,
            parameter,
            _apart(original, parameter),
            prepared[linear.name],
            wanted,
            group,
        )
        for linear, parameter, original, wanted in zip(linears, parameters, originals, counts, strict=True)
    ]


def pruned_linears(
    pruner: Pruner,
    index: int,
    linears: Sequence[Linear],
    stored: Mapping[str, Tensor],
    inputs: LayerInputs,
    counts: Sequence[int],
    group: int | None,
    device: torch.device,
) -> Iterator[Tensor]:
    """The pruned weight of one linear after the other, in the checkpoint's dtype and orientation, on the CPU.

    Args and errors: as for ``prunings_of_layer``.
    """
    touched = {linear.name for linear, count in zip(linears, counts, strict=True) if count}
    prepared: Mapping[str, Any] = (
        inputs if isinstance(inputs, Mapping) else _prepared(pruner, index, inputs, touched, device)
    )
    for linear, count in zip(linears, counts, strict=True):
        if not count:
            yield stored[linear.weight_name]
            continue
        weight = linear.oriented(stored[linear.weight_name]).to(device)
        with _naming(index, linear.name):
            if isinstance(pruner, MaskPruner):
                levels = pruner.removal_levels(weight, prepared[linear.name], [count], group)
                pruned = weight.masked_fill(levels == 0, 0)
            else:
                pruned = pruner.prune(weight, prepared[linear.name], count, group)
        yield linear.oriented(pruned).contiguous().cpu()


def _prepared(
    pruner: Pruner, index: int, inputs: GramsByInput, wanted: set[str], device: torch.device
) -> dict[str, Any]:
    """What a ``WeightPruner`` has to know of every linear's inputs, once for those that share them."""
    assert isinstance(pruner, WeightPruner), "masks need no Gram matrix"
    prepared: dict[str, Any] = {}
    for names, gram in inputs:
        if shared := [name for name in names if name in wanted]:
            with _naming(index, ", ".join(shared)):
                prepared |= dict.fromkeys(shared, pruner.prepare(gram.gram.to(device), gram.tokens))
    return prepared


class GradualZeroing:
    """Brings one weight, in place, from one lane's mask to the next, keeping only the values that a later
    lane needs again.

    Lanes are visited by rising sparsity of the layer, so nearly always more weights go and none comes back;
    rounding to whole weights can put two lanes of equal sparsity the other way round for single linears.

    Args:
        weight: changed in place.
        levels: see ``masks.removal_levels``; same shape.
        targets: for every lane in the order of the visits, the highest level it removes; -1 removes nothing.
    """

    def __init__(self, weight: Tensor, levels: Tensor, targets: Sequence[int]) -> None:
        self._weight, self._levels, self._targets = weight, levels, list(targets)
        self._reached = -1
        self._taken: dict[int, Tensor] = {}

    def visit(self, lane: int) -> None:
        """Set the weight to the mask of the ``lane``-th visit."""
        target, later = self._targets[lane], self._targets[lane + 1 :]
        lowest_later = min(later, default=target)
        while self._reached < target:
            self._reached += 1
            mask = self._levels == self._reached
            if self._reached > lowest_later:
                self._taken[self._reached] = self._weight[mask]
            self._weight.masked_fill_(mask, 0)
        while self._reached > target:
            self._weight[self._levels == self._reached] = self._taken.pop(self._reached)
            self._reached -= 1


def _zeroing(
    pruner: MaskPruner,
    index: int,
    linear: Linear,
    parameter: Tensor,
    original: Tensor,
    inputs: InputStatistics,
    counts: Sequence[int],
    group: int | None,
) -> GradualZeroing:
    distinct = sorted(set(counts))
    with _naming(index, linear.name):
        levels = pruner.removal_levels(original, inputs, distinct, group)
    return GradualZeroing(parameter, levels, [distinct.index(count) for count in counts])


def _apart(original: Tensor, parameter: Tensor) -> Tensor:
    """``original`` where no change to ``parameter`` reaches it."""
    return original.clone() if original.data_ptr() == parameter.data_ptr() else original


@dataclass(frozen=True)
class _Replacing:
    """Gives a weight, in place, new values for every lane."""

    pruner: WeightPruner
    index: int
    linear: Linear
    parameter: Tensor
    original: Tensor
    prepared: Any
    counts: Sequence[int]
    group: int | None

    def visit(self, lane: int) -> None:
        if lane and self.counts[lane] == self.counts[lane - 1]:
            return
        with _naming(self.index, self.linear.name):
            self.parameter.copy_(
                self.pruner.prune(self.original, self.prepared, self.counts[lane], self.group)
            )


@contextmanager
def _naming(index: int, name: str) -> Iterator[None]:
    """Say in an error which linear of which layer it is about."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"layer {index}, {name}: {error}") from error
