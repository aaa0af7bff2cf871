"""Pruning of the linears of one decoder layer, for several lanes one after another or for one export.

There are two kinds of pruners. A ``MaskPruner`` (magnitude, Wanda) ranks the weights. The masks of rising sparsities
are nested, so one ranking serves all lanes, and weights are zeroed in place. A ``WeightPruner`` (SparseGPT, ALPS)
corrects the remaining weights by the second moments of their inputs. Each lane then has its own weights, but what
depends on the inputs alone is computed once for all lanes and for all linears that share the inputs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from layerwise.calibration.gram import InputGram
from layerwise.calibration.statistics import InputStatistics
from layerwise.models.skeleton import Linear
from layerwise.pruners.dsnot import DSnoT
from layerwise.pruners.row_levels import INTEGERS

# Weights that are set to zero at a time; their temporary array fits in the cache.
ZEROED_ENTRIES = 1 << 18

GramsByInput = Iterable[tuple[Sequence[str], InputGram]]
LayerInputs = Mapping[str, InputStatistics] | GramsByInput


@runtime_checkable
class MaskPruner(Protocol):
    """Pruner that ranks the weights of a linear; see ``wanda.Wanda.removal_levels``."""

    @property
    def method(self) -> str: ...

    def removal_levels(
        self, weight: Tensor, inputs: InputStatistics, counts: Sequence[int], group: int | None = None
    ) -> Tensor: ...


@runtime_checkable
class WeightPruner(Protocol):
    """Pruner that uses second moments, and may correct the weights that remain; see ``sparsegpt.SparseGPT``."""

    @property
    def method(self) -> str: ...

    def prepare(self, gram: Tensor, tokens: int, overwrite: bool = False) -> Any: ...

    def prune(self, weight: Tensor, prepared: Any, count: int, group: int | None = None) -> Tensor: ...


Pruner = MaskPruner | WeightPruner


class LinearPruning(Protocol):
    """Sets the weight of one linear, in place, to its pruned value in one lane after another.

    Attributes:
        mask: removed weights in the lane visited last, ``(out_features, in_features)``, ``True`` means "removed".
    """

    linear: Linear

    def visit(self, lane: int) -> None: ...

    @property
    def mask(self) -> Tensor: ...


@dataclass(frozen=True)
class LayerPruning:
    """Pruning of the linears of one decoder layer.

    Attributes:
        pruner: selects the weights to remove.
        group: M of an N:M pattern; None without a pattern.
        index: index of the layer, for messages.
        linears: linears of the layer.
        stored: weights by name, in the checkpoint's dtype. These are ranked and pruned, as in an export; converting
            them first could make different weights equal.
        inputs: calibration of the layer: input statistics by linear for a ``MaskPruner``, otherwise Gram matrices, which
            are overwritten: every pruning needs its own.
    """

    pruner: Pruner
    group: int | None
    index: int
    linears: Sequence[Linear]
    stored: Mapping[str, Tensor]
    inputs: LayerInputs

    def in_lanes(self, parameters: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> list[LinearPruning]:
        """Create the pruning of every linear that loses weights in any lane.

        Visit the lanes in the order of rising sparsity of the layer.

        Args:
            parameters: weight of every linear in the model, ``(out_features, in_features)``; changed by the visits.
            counts: by linear, the number of weights to remove in each lane, in the order of the visits.

        Raises:
            ValueError: a linear cannot be pruned; the message names it.
        """
        touched = [number for number, wanted in enumerate(counts) if any(wanted)]
        linears = [self.linears[number] for number in touched]
        originals = [
            linear.oriented(self.stored[linear.weight_name]).to(parameters[number].device)
            for number, linear in zip(touched, linears, strict=True)
        ]
        if isinstance(self.pruner, MaskPruner):
            assert isinstance(self.inputs, Mapping), "a MaskPruner needs input statistics"
            return [
                self._zeroing(linear, parameters[number], original, counts[number])
                for number, linear, original in zip(touched, linears, originals, strict=True)
            ]
        device = parameters[touched[0]].device if touched else torch.device("cpu")
        prepared = self._prepared({linear.name for linear in linears}, device)
        return [
            _Replacing(
                self,
                linear,
                parameters[number],
                _apart(original, parameters[number]),
                prepared,
                counts[number],
            )
            for number, linear, original in zip(touched, linears, originals, strict=True)
        ]

    def pruned_weights(self, counts: Sequence[int], device: torch.device) -> Iterator[Tensor]:
        """Yield the pruned weight of every linear, in the dtype, orientation and device of the stored weights.

        A ``MaskPruner`` prunes a stored weight that is on the device of the computation in place, and yields it.

        Args:
            counts: number of weights to remove from every linear.
            device: device of the computation.

        Raises:
            ValueError: a linear cannot be pruned; the message names it.
        """
        touched = {linear.name for linear, count in zip(self.linears, counts, strict=True) if count}
        prepared = {} if isinstance(self.inputs, Mapping) else self._prepared(touched, device)
        for linear, count in zip(self.linears, counts, strict=True):
            if not count:
                yield self.stored[linear.weight_name]
                continue
            stored = self.stored[linear.weight_name]
            weight = linear.oriented(stored).to(device)
            if isinstance(self.pruner, MaskPruner):
                self._zeroing(linear, weight, weight, [count]).visit(0)
            else:
                weight = self.corrected(linear, weight, prepared, count)
            is_in_place = isinstance(self.pruner, MaskPruner) and weight.device == stored.device
            yield stored if is_in_place else linear.oriented(weight).contiguous().to(stored.device)

    def removal_levels(self, linear: Linear, weight: Tensor, counts: Sequence[int]) -> Tensor:
        """Rank the weights of a linear with a ``MaskPruner``; see ``masks.removal_levels``."""
        assert isinstance(self.pruner, MaskPruner), "a WeightPruner does not rank weights"
        assert isinstance(self.inputs, Mapping), "a MaskPruner needs input statistics"
        with _naming(self.index, linear.name):
            return self.pruner.removal_levels(weight, self.inputs[linear.name], counts, self.group)

    def corrected(self, linear: Linear, weight: Tensor, prepared: Mapping[str, Any], count: int) -> Tensor:
        """Prune the weight of a linear with a ``WeightPruner``."""
        assert isinstance(self.pruner, WeightPruner), "a MaskPruner does not correct weights"
        with _naming(self.index, linear.name):
            return self.pruner.prune(weight, prepared[linear.name], count, self.group)

    def _prepared(self, wanted: set[str], device: torch.device) -> dict[str, Any]:
        """Prepare a ``WeightPruner`` for the inputs of every wanted linear, once for linears that share them."""
        assert isinstance(self.pruner, WeightPruner), "a MaskPruner does not use Gram matrices"
        assert not isinstance(self.inputs, Mapping), "a WeightPruner needs Gram matrices"
        prepared: dict[str, Any] = {}
        for names, gram in self.inputs:
            if shared := [name for name in names if name in wanted]:
                with _naming(self.index, ", ".join(shared)):
                    of_input = self._prepare(gram, device)
                prepared |= dict.fromkeys(shared, of_input)
        return prepared

    def _prepare(self, gram: InputGram, device: torch.device) -> Any:
        if isinstance(self.pruner, DSnoT):
            return self.pruner.prepare(gram.gram.to(device), gram.tokens, overwrite=True, sums=gram.sums)
        assert isinstance(self.pruner, WeightPruner), "a MaskPruner does not use Gram matrices"
        return self.pruner.prepare(gram.gram.to(device), gram.tokens, overwrite=True)

    def _zeroing(
        self, linear: Linear, parameter: Tensor, original: Tensor, counts: Sequence[int]
    ) -> "GradualZeroing":
        distinct = sorted(set(counts))
        levels = self.removal_levels(linear, original, distinct)
        return GradualZeroing(linear, parameter, levels, [distinct.index(count) for count in counts])


class GradualZeroing:
    """Pruning by masks: changes one weight in place from one lane's mask to the next.

    Lanes are visited by rising sparsity of the layer, so weights are usually only removed. Because counts are rounded,
    a single linear can lose fewer weights in a later lane; only the values that such a lane needs again are kept.

    Args:
        linear: the linear.
        weight: its weight; changed in place.
        levels: result of ``masks.removal_levels``; same shape.
        targets: for every lane in the order of the visits, the highest removed level; -1 removes nothing.
    """

    def __init__(self, linear: Linear, weight: Tensor, levels: Tensor, targets: Sequence[int]) -> None:
        self.linear = linear
        self._weight, self._levels, self._targets = weight, levels, list(targets)
        self._reached = -1
        self._taken: dict[int, Tensor] = {}

    def visit(self, lane: int) -> None:
        """Apply the mask of the ``lane``-th visit to the weight."""
        target, later = self._targets[lane], self._targets[lane + 1 :]
        lowest_later = min(later, default=target)
        while self._reached < target:
            self._reached += 1
            if self._reached > lowest_later:
                self._taken[self._reached] = self._weight[self._levels == self._reached]
            self._remove(self._reached)
        while self._reached > target:
            self._weight[self._levels == self._reached] = self._taken.pop(self._reached)
            self._reached -= 1

    def _remove(self, level: int) -> None:
        """Set the weights of one level to zero."""
        bits = self._weight.detach().view(INTEGERS[self._weight.element_size()])
        step = max(1, ZEROED_ENTRIES // max(bits.shape[1], 1))
        for first in range(0, len(bits), step):
            # The product of integers is exact, also for NaN and infinity, and takes a fifth of the time of masked_fill_.
            kept = (self._levels[first : first + step] ^ level).clamp_(max=1)
            bits[first : first + step].mul_(kept)

    @property
    def mask(self) -> Tensor:
        """Removed weights in the lane visited last."""
        # Levels are unsigned: -1 removes nothing.
        return (
            self._levels <= self._reached
            if self._reached >= 0
            else torch.zeros_like(self._levels, dtype=torch.bool)
        )


def _apart(original: Tensor, parameter: Tensor) -> Tensor:
    """Return ``original``, copied if it shares memory with ``parameter``."""
    return original.clone() if original.data_ptr() == parameter.data_ptr() else original


@dataclass
class _Replacing:
    """Pruning by correction: overwrites a weight with new values for every lane."""

    layer: LayerPruning
    linear: Linear
    parameter: Tensor
    original: Tensor
    prepared: Mapping[str, Any]
    counts: Sequence[int]
    mask: Tensor = field(init=False)

    def visit(self, lane: int) -> None:
        if lane and self.counts[lane] == self.counts[lane - 1]:
            return
        pruned = self.layer.corrected(self.linear, self.original, self.prepared, self.counts[lane])
        self.mask = pruned == 0
        self.parameter.copy_(pruned)


@contextmanager
def _naming(index: int, name: str) -> Iterator[None]:
    """Add the layer and the linear to the message of a ValueError raised within the block."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"layer {index}, {name}: {error}") from error
