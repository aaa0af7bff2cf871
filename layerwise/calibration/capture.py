"""Capture of the inputs of every linear, in one pass of the dense model over the calibration windows."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from layerwise.calibration.gram import InputGram, collect_grams
from layerwise.calibration.statistics import InputStatistics, collect_statistics
from layerwise.models.hidden_states import batches
from layerwise.models.nan_check import FiniteCheck, is_finite
from layerwise.models.streaming import StreamedModel

OTHER_DTYPE = "Use another dtype: --dtype bfloat16 or float32."


@dataclass(frozen=True)
class CapturedLayer:
    """Input statistics of one decoder layer, by linear."""

    index: int
    statistics: Mapping[str, InputStatistics]


def embed_windows(model: StreamedModel, input_ids: Tensor, hidden_states: Tensor, first_part: int) -> None:
    """Write the state before the first decoder layer for all windows, then release the model's embedding.

    Args:
        input_ids: shape ``(windows, seqlen)``.
        hidden_states: states, shape ``(windows, seqlen, layout.size)``; overwritten.
        first_part: number of leading windows that are batched separately from the others.

    Raises:
        ValueError: the embedding returns NaN or infinity.
    """
    outputs = FiniteCheck()
    for part in (slice(0, first_part), slice(first_part, None)):
        for some_ids, some_states in zip(batches(input_ids[part]), batches(hidden_states[part]), strict=True):
            some_states.copy_(model.embed(some_ids))
            outputs.add(model.hidden_states(some_states))
    if not outputs.is_finite():
        raise ValueError(f"the embedding returns NaN or infinity in {_name(model)}. {OTHER_DTYPE}")
    model.release_embedding()


def capture_layers(
    model: StreamedModel,
    layers: Iterable[Mapping[str, Tensor]],
    hidden_states: Tensor,
    calibration_windows: int,
    first: int = 0,
    counted: Tensor | None = None,
) -> Iterator[CapturedLayer]:
    """Advance ``hidden_states`` in place through the dense model, one layer per step.

    Args:
        model: computes the layers.
        layers: weights of layer ``first`` and the following layers, by name relative to the layer.
        hidden_states: states before layer ``first``, shape ``(windows, seqlen, layout.size)``; those after a layer
            when the layer is yielded.
        calibration_windows: number of leading windows that are included in the statistics.
        first: index of the first layer.
        counted: mask of the calibration tokens that are included, shape ``(calibration_windows, seqlen)``; None for all.

    Raises:
        ValueError: a layer returns NaN or infinity.
    """
    for index, weights in enumerate(layers, first):
        outputs = FiniteCheck()
        with model.loaded(index, weights) as layer:
            with collect_statistics(layer, model.linears[index], counted) as statistics:
                for states in batches(hidden_states[:calibration_windows]):
                    states.copy_(model.run_layer(index, layer, states))
                    outputs.add(model.hidden_states(states))
            for states in batches(hidden_states[calibration_windows:]):
                states.copy_(model.run_layer(index, layer, states))
                outputs.add(model.hidden_states(states))
        if not outputs.is_finite():
            raise _not_finite(model, index, weights)
        yield CapturedLayer(index, statistics)


def capture_grams(
    model: StreamedModel,
    layers: Iterable[Mapping[str, Tensor]],
    hidden_states: Tensor,
    first: int = 0,
    counted: Tensor | None = None,
    with_sums: bool = False,
) -> Iterator[Mapping[str, InputGram]]:
    """Advance the calibration windows in place through the dense model, one layer per step.

    Args:
        model, layers, hidden_states, first, counted: as for ``capture_layers``.
        with_sums: also collect the sum of every input over the tokens.

    Yields:
        Gram matrices of the layer's inputs, by linear; linears that share their input have the same object.
    """
    for index, weights in enumerate(layers, first):
        with (
            model.loaded(index, weights) as layer,
            collect_grams(layer, model.linears[index], counted, with_sums) as grams,
        ):
            for states in batches(hidden_states):
                states.copy_(model.run_layer(index, layer, states))
        yield grams


def _not_finite(model: StreamedModel, index: int, weights: Mapping[str, Tensor]) -> ValueError:
    if damaged := [name for name, weight in weights.items() if not is_finite(weight)]:
        return ValueError(
            f"layer {index} of the dense model returns NaN or infinity, because its {', '.join(damaged)} contain such "
            "values. Replace the checkpoint by an undamaged copy."
        )
    return ValueError(
        f"layer {index} of the dense model returns NaN or infinity in {_name(model)}. {OTHER_DTYPE}"
    )


def _name(model: StreamedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
