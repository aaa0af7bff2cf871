"""Measure: score every decoder layer, or every linear, of the dense model for an allocator."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from layerwise.allocators.allocator import Allocator
from layerwise.allocators.alpha_pruning import AlphaPruning, tail_exponent
from layerwise.allocators.dlp import DLP, typical_score
from layerwise.allocators.dsa import DSA, log_variance
from layerwise.allocators.global_threshold import (
    LOWER,
    UPPER,
    Global,
    count_lower,
    count_upper,
    fractions_below,
    threshold_bin,
)
from layerwise.allocators.lamp import LAMP, lamp_scores
from layerwise.allocators.lsa import LSA, half_removed_error
from layerwise.allocators.owl import OWL, outlier_percentage
from layerwise.allocators.sparsity_plan import Granularity, Unit, units_of
from layerwise.calibration.statistics import InputStatistics
from layerwise.models.skeleton import Linear
from layerwise.pruners.layer_pruning import Pruner
from layerwise.pruners.magnitude import Magnitude
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table, write_table
from layerwise.storage.tensors import read_tensor_into, write_tensors
from layerwise.tasks.lanes.gram_matrices import read_grams
from layerwise.tasks.lanes.statistics_table import read_statistics, statistics_identity
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.results.run_names import model_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing
from layerwise.tasks.running.stage_task import stage_task

SCORES_FILE = "scores.parquet"
ROWS_FILE = "scores.json"  # of a resume point: the rows so far
COUNTS_FILE = "counts.safetensors"  # of a resume point of a threshold


@dataclass(frozen=True)
class Threshold:
    """One threshold over all layers.

    Attributes:
        scores: scores that are compared.
        target: fraction of all weights below the threshold.
    """

    scores: Literal["wanda", "magnitude", "lamp"]
    target: float


def threshold_of(allocator: Allocator, pruner: Pruner, target: float) -> Threshold | None:
    """Return the threshold that the allocator needs; None if it scores every layer on its own."""
    if isinstance(allocator, LAMP):
        return Threshold("lamp", target)
    if isinstance(allocator, Global):
        return Threshold("magnitude" if isinstance(pruner, Magnitude) else "wanda", target)
    return None


def is_measured(allocator: Allocator) -> bool:
    """Return whether the allocator measures the model; the others only use the depth of a layer."""
    return isinstance(allocator, OWL | AlphaPruning | DSA | DLP | LSA | Global | LAMP)


def needs_grams(allocator: Allocator) -> bool:
    """Return whether the allocator uses second moments of the linears' inputs."""
    return isinstance(allocator, LSA)


def measure_stage(
    checkpoint: Checkpoint,
    capture: Artifact,
    grams: Artifact | None,
    allocator: Allocator,
    granularity: Granularity,
    linears: Sequence[Sequence[Linear]],
    threshold: Threshold | None = None,
) -> Stage:
    """Describe a measurement. The strength of the allocator is not part of the key."""
    what: dict[str, object] = {"allocator": allocator.method, "by_linear": granularity == "linear"}
    if granularity == "expert":
        what["by_expert"] = True
    what["linears"] = [[linear.name for linear in layer] for layer in linears]
    inputs = {"checkpoint": checkpoint.identity}
    if isinstance(allocator, LSA):
        assert grams is not None, "a search captures what its allocator needs"
        inputs["grams"] = grams.content
    elif threshold is not None:
        what["threshold"] = {"scores": threshold.scores, "target": threshold.target}
        if threshold.scores == "wanda":
            inputs["statistics"] = statistics_identity(capture)
    elif not isinstance(allocator, AlphaPruning):
        inputs["statistics"] = statistics_identity(capture)
    if isinstance(allocator, OWL):
        what["threshold"] = allocator.threshold
    if isinstance(allocator, DLP):
        what["statistic"] = allocator.statistic
    return Stage("measure", 1, what, inputs)


@stage_task(about=lambda checkpoint, allocator, **_: f"{model_title(checkpoint)} for {allocator.method}")
def measure(
    store: ArtifactStore,
    checkpoint: Checkpoint,
    capture: Artifact,
    grams: Artifact | None,
    allocator: Allocator,
    granularity: Granularity,
    linears: Sequence[Sequence[Linear]],
    execution: Execution,
    threshold: Threshold | None = None,
) -> Artifact:
    """Compute one score for every decoder layer, or for every part of it (``units_of``).

    Args:
        threshold: for an allocator that compares the weights of all layers: the score is the fraction of weights below it.
        grams: for an allocator that uses second moments.
        granularity: what gets a score.
        linears: the prunable linears, by layer.

    Returns:
        An artifact with ``scores.parquet``; columns: layer, linear (name of the linear or expert; null for a score of the layer),
        score.
    """
    stage = measure_stage(checkpoint, capture, grams, allocator, granularity, linears, threshold)
    units = [units_of([linear.name for linear in layer], granularity) for layer in linears]

    def scores_of(index: int, weights: Mapping[str, Tensor]) -> list[float]:
        of_units = [positions for _, positions in units[index]]
        return _scores(store, capture, grams, allocator, index, weights, of_units)

    def build(draft: Draft) -> None:
        if threshold is None:
            title = f"measure: {allocator.method}"
            scores = _score_layers(store, draft, checkpoint, linears, execution, title, scores_of)
        else:
            inputs = store, draft, checkpoint, capture, linears, execution
            scores = [*_find_threshold(*inputs, threshold, units)]
        entries = [(index, name) for index, layer in enumerate(units) for name, _ in layer]
        rows = [
            {"layer": index, "linear": name, "score": score}
            for (index, name), score in zip(entries, scores, strict=True)
        ]
        schema = pa.schema({"layer": pa.int64(), "linear": pa.string(), "score": pa.float64()})
        write_table(draft, SCORES_FILE, pa.Table.from_pylist(rows, schema=schema))

    return store.get_or_build(stage, build)


def _score_layers(
    store: ArtifactStore,
    draft: Draft,
    checkpoint: Checkpoint,
    linears: Sequence[Sequence[Linear]],
    execution: Execution,
    title: str,
    scores_of: Callable[[int, Mapping[str, Tensor]], Sequence[float]],
) -> list[float]:
    """Score every layer on its own; return the scores in order."""
    scores: list[float] = []
    first = 0
    if draft.resumed is not None:
        first = draft.resumed.step
        scores += [row["score"] for row in json.loads(store.read(draft.resumed.state, ROWS_FILE))]

    def write_rows(state: Draft) -> None:
        state.write(ROWS_FILE, json.dumps([{"score": score} for score in scores]).encode())

    with (
        boundaries(draft, execution, write_rows) as reached,
        showing(title, checkpoint.num_layers, first, draft.resumed) as show,
    ):
        for index, weights in _weights_of_layers(checkpoint, linears, first, execution):
            scores += scores_of(index, weights)
            show(index + 1)
            reached(index + 1)
    return scores


@torch.no_grad()
def _find_threshold(
    store: ArtifactStore,
    draft: Draft,
    checkpoint: Checkpoint,
    capture: Artifact,
    linears: Sequence[Sequence[Linear]],
    execution: Execution,
    threshold: Threshold,
    units: Sequence[Sequence[Unit]],
) -> tuple[float, ...]:
    """Find one threshold over all layers in two passes over the weights; return the fraction below it of every unit.

    Args:
        units: parts of every layer, see ``units_of``.
    """
    layers = checkpoint.num_layers
    starts = [0, *accumulate(map(len, units))]
    unit_of = [
        {position: number for number, (_, positions) in enumerate(layer) for position in positions}
        for layer in units
    ]
    upper = torch.zeros(UPPER, dtype=torch.int64)
    below = torch.zeros(starts[-1], dtype=torch.int64)
    within = torch.zeros(starts[-1], LOWER, dtype=torch.int32)
    counts = {"upper": upper, "below": below, "within": within}
    first = 0
    if draft.resumed is not None:
        first = draft.resumed.step
        for name, tensor in counts.items():
            read_tensor_into(store, draft.resumed.state, COUNTS_FILE, name, tensor)

    def count(step: int, weights: Mapping[str, Tensor]) -> None:
        index = step % layers
        for number, scores in enumerate(_compared_scores(store, capture, threshold, index, weights)):
            entry = starts[index] + unit_of[index][number]
            if step < layers:
                upper.add_(count_upper(scores))
                continue
            lower, in_bin = count_lower(scores, threshold_bin(upper, threshold.target))
            below[entry] += lower
            within[entry] += in_bin

    def write_counts(state: Draft) -> None:
        write_tensors(state, COUNTS_FILE, counts)

    title = f"measure: threshold of {threshold.scores} scores"
    with (
        boundaries(draft, execution, write_counts) as reached,
        showing(title, 2 * layers, first, draft.resumed) as show,
    ):
        for before in (0, layers):
            for index, weights in _weights_of_layers(checkpoint, linears, max(first - before, 0), execution):
                count(before + index, weights)
                show(before + index + 1)
                reached(before + index + 1)
    sizes = [
        sum(layer[position].numel for position in positions)
        for layer, parts in zip(linears, units, strict=True)
        for _, positions in parts
    ]
    return fractions_below(below.tolist(), within, sizes, threshold.target)


def _compared_scores(
    store: ArtifactStore, capture: Artifact, threshold: Threshold, index: int, weights: Mapping[str, Tensor]
) -> Iterator[Iterable[Tensor]]:
    """Yield the scores of every linear that a threshold compares, in pieces of any shape."""
    statistics = read_statistics(store, capture, index) if threshold.scores == "wanda" else {}
    for name, weight in weights.items():
        if threshold.scores == "lamp":
            yield lamp_scores(weight)
        elif threshold.scores == "magnitude":
            yield [weight.abs().float()]
        else:
            yield [_wanda_scores(weight, statistics[name])]


def _weights_of_layers(
    checkpoint: Checkpoint, linears: Sequence[Sequence[Linear]], first: int, execution: Execution
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield the weights of the linears of every layer from ``first`` on, shape ``(out_features, in_features)``."""
    for index, weights in enumerate(checkpoint.layers(first, execution.torch_device), first):
        yield (
            index,
            {
                linear.name: linear.oriented(weights[linear.weight_name]).to(execution.torch_device)
                for linear in linears[index]
            },
        )


def read_scores(store: ArtifactStore, artifact: Artifact) -> tuple[float, ...]:
    """Read the scores of all layers, or of all linears, in order."""
    return tuple(read_table(store, artifact, SCORES_FILE)["score"].to_pylist())


@torch.no_grad()
def _scores(
    store: ArtifactStore,
    capture: Artifact,
    grams: Artifact | None,
    allocator: Allocator,
    index: int,
    weights: Mapping[str, Tensor],
    units: Sequence[Sequence[int]],
) -> list[float]:
    """Score the units of one layer, given by the positions of their linears."""
    if isinstance(allocator, AlphaPruning):
        return _means([tail_exponent(weight) for weight in weights.values()], units)
    if isinstance(allocator, LSA):
        assert grams is not None, "a search captures what its allocator needs"
        errors = {
            name: half_removed_error(weights[name], gram.gram.to(weights[name].device))
            for names, gram in read_grams(store, grams, index)
            for name in names
            if name in weights
        }
        return _means([errors[name] for name in weights], units)
    statistics = read_statistics(store, capture, index)
    wanda = [_wanda_scores(weight, statistics[name]) for name, weight in weights.items()]
    of_some = _measurement(allocator)
    return [of_some([wanda[position] for position in unit]) for unit in units]


def _wanda_scores(weight: Tensor, inputs: InputStatistics) -> Tensor:
    return weight.abs().float() * inputs.norms.to(weight.device)


def _means(scores: Sequence[float], units: Sequence[Sequence[int]]) -> list[float]:
    return [fmean(scores[position] for position in unit) for unit in units]


def _measurement(allocator: Allocator) -> Callable[[list[Tensor]], float]:
    """Return the function that turns the Wanda scores of some linears into one number."""
    if isinstance(allocator, OWL):
        return lambda scores: outlier_percentage(scores, allocator.threshold)
    if isinstance(allocator, DLP):
        return lambda scores: typical_score(scores, allocator.statistic)
    assert isinstance(allocator, DSA), "every measured allocator has a branch here"
    return log_variance
