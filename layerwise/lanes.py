"""Lanes: several sparsity plans that advance through one model together, so that its weights are read once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from layerwise.calibration.few_tokens import statistics_to_prune_by
from layerwise.calibration.statistics import InputStatistics, collect_statistics
from layerwise.models.hidden_states import batches
from layerwise.models.skeleton import Linear
from layerwise.models.streaming import StreamedModel
from layerwise.pruners.layer_pruning import LayerInputs, LayerPruning, LinearPruning, MaskPruner, Pruner
from layerwise.pruners.masks import count_zeros
from layerwise.recovery.layer_recovery import RecoveredLayer, Recovery, RecoveryOutcome, recover_layer
from layerwise.recovery.linear_inputs import LinearInputs
from layerwise.recovery.pruned_layer import LayerToRecover, PrunedLinear, weights_replaced
from layerwise.scoring.local_errors import LocalErrors, local_errors, squared_difference, squared_norm


@dataclass
class Lane:
    """One plan and the hidden states that it has reached.

    Attributes:
        removed: number of weights to remove from every linear of every layer; None for the dense model.
        hidden_states: states, shape ``(windows, seqlen, layout.size)``; the lane's own calibration windows, if any, come
            first. The dense lane may lack the scored windows, or all: then no errors are measured.
        statistics: input statistics from the lane's own calibration, by layer and linear; only with sequential
            calibration.
        recovered_weights: returns the weights of a layer that an earlier recovery has found, by linear, in the
            checkpoint's dtype; empty if the layer keeps its pruned weights. None if the layer is still to be recovered.
        recovered: weights of each layer that this group has recovered, by linear; empty if they were not accepted. None if
            they are not kept: those of a layer take as much memory as the layer.
    """

    removed: tuple[tuple[int, ...], ...] | None
    hidden_states: Tensor
    statistics: list[Mapping[str, InputStatistics]] = field(default_factory=list)
    recovered_weights: Callable[[int], Mapping[str, Tensor] | None] = lambda layer: None
    recovered: list[Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class LaneLayer:
    """Result of one layer in one lane.

    Attributes:
        error: squared Frobenius norm of this lane's output minus the dense model's output of this layer, summed over
            the scored windows. The input is the lane's own, so the errors of earlier layers are included (ATP, section
            3: accumulated reconstruction error). None if the dense lane has no scored windows.
        energy: squared Frobenius norm of the dense model's output; None likewise.
        zeros: number of zero weights of every linear after pruning.
        parts: parts of the error, if they were measured; None for the dense lane.
        recovery: errors that decided on the recovery of this layer; None if it was not recovered in this group.
    """

    error: float | None
    energy: float | None
    zeros: tuple[int, ...]
    parts: LocalErrors | None = None
    recovery: RecoveryOutcome | None = None


@dataclass(frozen=True)
class LaneGroup:
    """Lanes that advance through one model together.

    Attributes:
        model: computes the layers.
        lanes: all lanes, the dense lane first, as the reference of the reconstruction errors; advanced in place.
        pruner: selects the weights to remove.
        inputs_of: returns the dense model's calibration of a layer: input statistics, or Gram matrices for a pruner
            that corrects weights. None for sequential calibration: every lane calibrates on its own hidden states.
        calibration_windows: number of leading windows in every lane's hidden states that are for its own calibration.
        pattern_group: M of an N:M pattern; None without a pattern.
        local_windows: number of scored windows for ``LaneLayer.parts``; on these, every pruned layer also runs on the
            dense model's input.
        recovery: recovers every pruned layer on its lane's own calibration windows; None for plain pruning. Masks come
            from ``inputs_of``.
        rooms: two tensors for hidden states of the calibration windows, which a recovery overwrites; needed if a layer
            has to be recovered.
        counted: mask of the tokens of these windows that statistics and recovery use, shape
            ``(calibration_windows, seqlen)``; None for all.

    Raises:
        ValueError: the first lane is not dense, or the pruner corrects weights and ``inputs_of`` is None.
    """

    model: StreamedModel
    lanes: Sequence[Lane]
    pruner: Pruner
    inputs_of: Callable[[int], LayerInputs] | None
    calibration_windows: int = 0
    pattern_group: int | None = None
    local_windows: int = 0
    recovery: Recovery | None = None
    rooms: tuple[Tensor, Tensor] | None = None
    counted: Tensor | None = None

    def __post_init__(self) -> None:
        if self.lanes[0].removed is not None:
            raise ValueError(
                "the first lane is not the dense model, which the reconstruction errors refer to. Put the dense lane "
                "first."
            )
        if self.inputs_of is None and not isinstance(self.pruner, MaskPruner):
            raise ValueError(
                f"{type(self.pruner).__name__} corrects weights by Gram matrices, which sequential calibration does "
                "not collect. Use the dense model's calibration."
            )

    def advance(
        self, layers: Iterable[Mapping[str, Tensor]], first: int = 0
    ) -> Iterator[tuple[LaneLayer, ...]]:
        """Advance all lanes in place, one layer per step.

        Args:
            layers: weights of layer ``first`` and the following layers, in the checkpoint's dtype; they are changed.
            first: index of the first layer.

        Yields:
            Result of the layer in every lane.
        """
        for index, weights in enumerate(layers, first):
            with self.model.loaded(index, weights) as layer:
                if self.inputs_of is None:
                    yield self._sequentially(index, layer, weights)
                else:
                    yield self._together(index, layer, weights, self.inputs_of(index))

    def _together(
        self, index: int, layer: nn.Module, weights: Mapping[str, Tensor], inputs: LayerInputs
    ) -> tuple[LaneLayer, ...]:
        """Prune all lanes by the dense model's calibration, in the order of rising sparsity."""
        order = sorted(range(1, len(self.lanes)), key=lambda lane: sum(self._removed(lane, index)))
        linears = self.model.linears[index]
        dense = {}
        if self.recovery is not None:
            dense = {linear.name: _weight_of(layer, linear).detach().clone() for linear in linears}
        with torch.no_grad():
            prunings = self._prunings(index, layer, weights, inputs, order)
        dense_input = self._first_windows(0).to(self.model.device, copy=True)
        if self.recovery is None:
            self._calibrate(0, index, layer)
        outcomes = {0: self._score(0, index, layer)}
        recoveries: dict[int, RecoveryOutcome | None] = {}
        for visit, lane in enumerate(order):
            with torch.no_grad():
                for pruning in prunings:
                    pruning.visit(visit)
            found = self._recovered(lane, index, layer, weights, prunings, dense)
            with weights_replaced(layer, found.weights):
                self._calibrate(lane, index, layer, found.inputs)
                has_known_zeros = not found.weights
                outcomes[lane] = self._score(lane, index, layer, dense_input, outcomes[0], has_known_zeros)
            recoveries[lane] = found.outcome
            del found  # its weights would be in memory while the next lane is recovered
        if self.recovery is not None:
            with weights_replaced(layer, dense):  # last: every lane's recovery needs the dense model's input
                self._calibrate(0, index, layer)
        read = _read([outcomes[lane] for lane in range(len(self.lanes))])
        return tuple(replace(each, recovery=recoveries.get(lane)) for lane, each in enumerate(read))

    def _recovered(
        self,
        lane: int,
        index: int,
        layer: nn.Module,
        stored: Mapping[str, Tensor],
        prunings: Sequence[LinearPruning],
        dense: Mapping[str, Tensor],
    ) -> RecoveredLayer:
        """Return the weights that replace the pruned ones of a layer in one lane, found now or earlier."""
        found = self.lanes[lane].recovered_weights(index)
        if found is not None or self.recovery is None:
            return RecoveredLayer(found or {})
        counts = dict(zip(self.model.linears[index], self._removed(lane, index), strict=True))
        linears = [
            PrunedLinear(
                pruning.linear,
                dense[pruning.linear.name],
                pruning.linear.oriented(pruning.mask),
                stored[pruning.linear.weight_name],
            )
            for pruning in prunings
            if counts[pruning.linear]
        ]
        if not linears:
            return self._kept(lane, RecoveredLayer({}))
        assert self.rooms is not None, "a group that recovers has them"
        calibration = slice(0, self.calibration_windows)
        pruned = LayerToRecover(
            self.model,
            index,
            layer,
            linears,
            self.lanes[lane].hidden_states[calibration],
            self.lanes[0].hidden_states[calibration],
            self.rooms,
            self.counted,
        )
        return self._kept(lane, recover_layer(pruned, self.recovery))

    def _kept(self, lane: int, recovered: RecoveredLayer) -> RecoveredLayer:
        kept = self.lanes[lane].recovered
        if kept is not None:
            kept.append(recovered.weights)
        return recovered

    def _sequentially(
        self, index: int, layer: nn.Module, weights: Mapping[str, Tensor]
    ) -> tuple[LaneLayer, ...]:
        """Run the unpruned layer on each lane's hidden states to collect statistics, then prune the lane's layer with them."""
        for lane in self.lanes[1:]:
            with collect_statistics(layer, self.model.linears[index], self.counted) as statistics:
                for states in batches(lane.hidden_states[: self.calibration_windows]):
                    self.model.run_layer(index, layer, states)
            lane.statistics.append(statistics)
        dense_input = self._first_windows(0).to(self.model.device, copy=True)
        self._calibrate(0, index, layer)
        outcomes = [self._score(0, index, layer)]
        with torch.no_grad():
            parameters = self._parameters(index, layer)
            dense = [parameter.clone() for parameter in parameters]
            for number, lane in enumerate(self.lanes[1:], 1):
                inputs = statistics_to_prune_by(lane.statistics[-1])
                for pruning in self._prunings(index, layer, weights, inputs, [number]):
                    pruning.visit(0)
                self._calibrate(number, index, layer)
                outcomes.append(self._score(number, index, layer, dense_input, outcomes[0]))
                for original, parameter in zip(dense, parameters, strict=True):
                    parameter.copy_(original)
        return tuple(_read(outcomes))

    def _prunings(
        self,
        index: int,
        layer: nn.Module,
        weights: Mapping[str, Tensor],
        inputs: LayerInputs,
        order: Sequence[int],
    ) -> list[LinearPruning]:
        linears = self.model.linears[index]
        counts = list(zip(*(self._removed(lane, index) for lane in order), strict=True)) or [()] * len(
            linears
        )
        layer_pruning = LayerPruning(self.pruner, self.pattern_group, index, linears, weights, inputs)
        return layer_pruning.in_lanes(self._parameters(index, layer), counts)

    def _parameters(self, index: int, layer: nn.Module) -> list[Tensor]:
        return [linear.oriented(_weight_of(layer, linear)) for linear in self.model.linears[index]]

    def _removed(self, lane: int, index: int) -> tuple[int, ...]:
        removed = self.lanes[lane].removed
        assert removed is not None, "only the first lane is dense"
        return removed[index]

    def _first_windows(self, lane: int) -> Tensor:
        """Return the states of the windows with local errors, shape ``(windows, seqlen, layout.size)``."""
        scored = self.lanes[lane].hidden_states[self.calibration_windows :]
        return scored[: self.local_windows]

    def _calibrate(self, lane: int, index: int, layer: nn.Module, inputs: LinearInputs | None = None) -> None:
        """Advance one lane's calibration windows in place.

        Args:
            inputs: kept inputs of the layer's linears, which shorten the pass; None to compute everything.
        """
        for number, states in enumerate(batches(self.lanes[lane].hidden_states[: self.calibration_windows])):
            with nullcontext() if inputs is None else inputs.from_kept(number, len(states)):
                states.copy_(self.model.run_layer(index, layer, states))

    def _zeros(
        self, lane: int, index: int, layer: nn.Module, dense: "_Measured | None", are_known: bool
    ) -> list[int | Tensor]:
        """Return the zeros of every linear: counted, or those removed if a mask pruner was all that made zeros."""
        linears = self.model.linears[index]
        removed: Sequence[int | None] = [None] * len(linears)
        # A corrected weight can be rounded to zero.
        if dense is not None and are_known and isinstance(self.pruner, MaskPruner):
            before = dense.zeros
            if not all(
                isinstance(zeros, int) for zeros in before
            ):  # counted on a device: read once for all lanes
                before = dense.zeros = [
                    int(zeros) for zeros in torch.stack([*map(torch.as_tensor, before)]).cpu().tolist()
                ]
            counts = zip(before, self._removed(lane, index), strict=True)
            removed = [None if zeros else count for zeros, count in counts]
        return [
            count_zeros(_weight_of(layer, linear)) if known is None else known
            for linear, known in zip(linears, removed, strict=True)
        ]

    def _score(
        self,
        lane: int,
        index: int,
        layer: nn.Module,
        dense_input: Tensor | None = None,
        dense: "_Measured | None" = None,
        has_known_zeros: bool = True,
    ) -> "_Measured":
        """Advance one lane's scored windows in place and compare them with the dense lane's.

        Args:
            lane: index of the lane.
            index: index of the layer.
            layer: the layer, pruned for this lane.
            dense_input: the layer's input in the dense lane for the windows with local errors; None for the dense lane.
            dense: what was measured in the dense lane; None for the dense lane.
            has_known_zeros: whether the weights are those of the checkpoint with the mask of the lane.
        """
        device, hidden = self.model.device, self.model.hidden_states
        arriving = torch.zeros((), dtype=torch.float64, device=device)
        if dense_input is not None:
            own_input = hidden(self._first_windows(lane).to(device))
            arriving = squared_difference(own_input, hidden(dense_input))
        scored, reference = (self.lanes[each].hidden_states[self.calibration_windows :] for each in (lane, 0))
        error = torch.zeros((), dtype=torch.float64, device=device)
        energy = torch.zeros_like(error) if dense is None else dense.energy
        for number, states in enumerate(batches(scored)):
            after = self.model.run_layer(index, layer, states)
            states.copy_(after)
            if not len(reference):
                continue
            output = hidden(after)
            if dense is None:
                energy = energy + squared_norm(output.to(states.dtype).contiguous())
            else:
                dense_output = hidden(batches(reference)[number].to(device))
                error += squared_norm(output.float() - dense_output.float())
        parts = None
        if dense_input is not None and len(dense_input):

            def run(states: Tensor) -> Tensor:
                return hidden(self.model.run_layer(index, layer, states))

            own, dense_own = hidden(self._first_windows(lane)), hidden(self._first_windows(0))
            parts = local_errors(run, dense_input, arriving, own, dense_own)
        zeros = self._zeros(lane, index, layer, dense, has_known_zeros)
        windows = 0 if dense_input is None else len(dense_input)
        return _Measured(error, energy, zeros, parts, bool(len(reference)), windows)


@dataclass
class _Measured:
    """Result of one layer in one lane, with scalars on the device: reading one waits for the computation.

    Attributes:
        parts: norms of ``LocalErrors``; None if they were not measured.
        has_error: whether the dense lane has scored windows, so that ``error`` and ``energy`` mean something.
        local_windows: number of windows of ``parts``.
    """

    error: Tensor
    energy: Tensor
    zeros: Sequence[int | Tensor]
    parts: Tensor | None
    has_error: bool
    local_windows: int


def _read(measured: Sequence[_Measured]) -> list[LaneLayer]:
    """Read the results of all lanes together."""
    scalars: list[Tensor] = []
    for each in measured:
        scalars += [each.error, each.energy, *(() if each.parts is None else each.parts)]
        scalars += [zeros for zeros in each.zeros if isinstance(zeros, Tensor)]
    values = iter(torch.stack([scalar.double() for scalar in scalars]).cpu().tolist())
    found = []
    for each in measured:
        error, energy = next(values), next(values)
        parts = None
        if each.parts is not None:
            parts = LocalErrors(each.local_windows, *(next(values) for _ in each.parts))
        zeros = tuple(int(next(values)) if isinstance(zeros, Tensor) else zeros for zeros in each.zeros)
        if each.has_error:
            found.append(LaneLayer(error, energy, zeros, parts))
        else:
            found.append(LaneLayer(None, None, zeros, parts))
    return found


def _weight_of(layer: nn.Module, linear: Linear) -> Tensor:
    return layer.get_submodule(linear.name).weight  # type: ignore[return-value]
