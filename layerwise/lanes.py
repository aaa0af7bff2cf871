"""Lanes: several sparsity plans of one model that advance through it together, so that its weights are read once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from layerwise.hidden_states import batches
from layerwise.skeleton import Linear
from layerwise.statistics import InputStatistics, watching
from layerwise.streaming import StreamedModel


class Pruner(Protocol):
    """Says in which order the weights of a linear go; see ``wanda.Wanda.removal_levels``."""

    def removal_levels(self, weight: Tensor, inputs: InputStatistics, counts: Sequence[int]) -> Tensor: ...


@dataclass
class Lane:
    """One plan on its way through the model, with the hidden states it has reached.

    Attributes:
        removed: number of weights to remove from every linear of every layer; None for the dense model.
        hidden_states: shape ``(windows, seqlen, hidden_size)``; its own calibration windows, if any, come
        first.
        statistics: what this lane's own calibration saw, by layer and linear; only with sequential
        calibration.
    """

    removed: tuple[tuple[int, ...], ...] | None
    hidden_states: Tensor
    statistics: list[Mapping[str, InputStatistics]] = field(default_factory=list)


@dataclass(frozen=True)
class LaneLayer:
    """What one layer did in one lane.

    Attributes:
        error: squared Frobenius norm of the difference to the dense model's output of this layer, over all
            scored windows, each lane fed with its own hidden states (ATP, section 3: accumulated
            reconstruction error).
        energy: squared Frobenius norm of the dense model's output.
        zeros: zero weights of every linear after pruning.
    """

    error: float
    energy: float
    zeros: tuple[int, ...]


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


def run_lanes(
    model: StreamedModel,
    layers: Iterable[Mapping[str, Tensor]],
    lanes: Sequence[Lane],
    pruner: Pruner,
    statistics_of: Callable[[int], Mapping[str, InputStatistics]] | None,
    calibration_windows: int = 0,
    first: int = 0,
) -> Iterator[tuple[LaneLayer, ...]]:
    """Advance all lanes in place, one layer per step; yields what the layer did in every lane.

    Args:
        model: computes the layers.
        layers: weights of the layers from ``first`` on, in the checkpoint's dtype; they are changed.
        lanes: the dense lane first, as the reference of the reconstruction errors.
        pruner: chooses the weights that go.
        statistics_of: the dense model's input statistics of a layer; None lets every lane calibrate itself on
            its own hidden states (sequential calibration).
        calibration_windows: windows at the front of every lane's hidden states that serve its own
        calibration.
        first: layer to begin with.
    """
    if lanes[0].removed is not None:
        raise ValueError(
            "the first lane must be the dense model: the others' reconstruction errors refer to it."
        )
    advance = _Advance(model, lanes, pruner, calibration_windows)
    for index, weights in enumerate(layers, first):
        with model.loaded(index, weights) as layer:
            if statistics_of is None:
                yield advance.sequentially(index, layer, weights)
            else:
                yield advance.together(index, layer, weights, statistics_of(index))


@dataclass(frozen=True)
class _Advance:
    """One step of all lanes through one layer."""

    model: StreamedModel
    lanes: Sequence[Lane]
    pruner: Pruner
    calibration_windows: int

    def together(
        self,
        index: int,
        layer: nn.Module,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, InputStatistics],
    ) -> tuple[LaneLayer, ...]:
        """All lanes prune by the same statistics: one ranking per linear, the lanes visited by rising sparsity."""
        order = sorted(range(1, len(self.lanes)), key=lambda lane: sum(self._removed(lane, index)))
        zeroings = []
        with torch.no_grad():
            for position, linear in enumerate(self.model.linears[index]):
                counts = [self._removed(lane, index)[position] for lane in order]
                distinct = sorted(set(counts))
                parameter = linear.oriented(_weight_of(layer, linear))
                levels = self._levels(linear, parameter, weights, statistics[linear.name], distinct)
                zeroings.append(
                    GradualZeroing(parameter, levels, [distinct.index(count) for count in counts])
                )
        outcomes = {0: self._run(0, index, layer)}
        for visit, lane in enumerate(order):
            with torch.no_grad():
                for zeroing in zeroings:
                    zeroing.visit(visit)
            outcomes[lane] = self._run(lane, index, layer)
        return tuple(outcomes[lane] for lane in range(len(self.lanes)))

    def sequentially(
        self, index: int, layer: nn.Module, weights: Mapping[str, Tensor]
    ) -> tuple[LaneLayer, ...]:
        """Every lane first sees the layer unpruned with its own calibration windows, then prunes by what it saw."""
        for lane in self.lanes[1:]:
            with watching(layer, self.model.linears[index]) as statistics:
                for states in batches(lane.hidden_states[: self.calibration_windows]):
                    self.model.run_layer(index, layer, states)
            lane.statistics.append(statistics)
        outcomes = [self._run(0, index, layer)]
        with torch.no_grad():
            dense = [
                linear.oriented(_weight_of(layer, linear)).clone() for linear in self.model.linears[index]
            ]
            for number, lane in enumerate(self.lanes[1:], 1):
                for position, linear in enumerate(self.model.linears[index]):
                    parameter = linear.oriented(_weight_of(layer, linear))
                    count = self._removed(number, index)[position]
                    levels = self._levels(
                        linear, parameter, weights, lane.statistics[-1][linear.name], [count]
                    )
                    parameter.masked_fill_(levels == 0, 0)
                outcomes.append(self._run(number, index, layer))
                for original, linear in zip(dense, self.model.linears[index], strict=True):
                    linear.oriented(_weight_of(layer, linear)).copy_(original)
        return tuple(outcomes)

    def _removed(self, lane: int, index: int) -> tuple[int, ...]:
        removed = self.lanes[lane].removed
        assert removed is not None, "only the first lane is dense"
        return removed[index]

    def _levels(
        self,
        linear: Linear,
        parameter: Tensor,
        weights: Mapping[str, Tensor],
        inputs: InputStatistics,
        counts: Sequence[int],
    ) -> Tensor:
        """Rank by the checkpoint's own values, as the export will: casting could make ties of different ones."""
        stored = weights[linear.weight_name]
        if stored.dtype != parameter.dtype:
            parameter = linear.oriented(stored).to(parameter.device)
        return self.pruner.removal_levels(parameter, inputs, counts)

    def _run(self, lane: int, index: int, layer: nn.Module) -> LaneLayer:
        """Advance one lane's hidden states in place and compare its scored windows with the dense lane's."""
        hidden_states, dense = self.lanes[lane].hidden_states, self.lanes[0].hidden_states
        for states in batches(hidden_states[: self.calibration_windows]):
            states.copy_(self.model.run_layer(index, layer, states))
        error = energy = 0.0
        scored = batches(hidden_states[self.calibration_windows :])
        for states, reference in zip(scored, batches(dense[self.calibration_windows :]), strict=True):
            output = self.model.run_layer(index, layer, states)
            states.copy_(output)
            reference = reference.to(output.device).float()
            error += (output.float() - reference).square().sum().item() if lane else 0.0
            energy += reference.square().sum().item()
        zeros = tuple(
            weight.numel() - int(weight.count_nonzero())
            for weight in (_weight_of(layer, linear) for linear in self.model.linears[index])
        )
        return LaneLayer(error, energy, zeros)


def _weight_of(layer: nn.Module, linear: Linear) -> Tensor:
    return layer.get_submodule(linear.name).weight  # type: ignore[return-value]
