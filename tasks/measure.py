"""Measure: score every decoder layer, or every linear, of the dense model for an allocator."""

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import pyarrow as pa
import torch
from torch import Tensor

from layerwise.allocators.allocator import Allocator
from layerwise.allocators.alpha_pruning import AlphaPruning, tail_exponent
from layerwise.allocators.dlp import DLP, typical_score
from layerwise.allocators.dsa import DSA, log_variance
from layerwise.allocators.granularity import Granularity, units_of
from layerwise.allocators.lsa import LSA, half_removed_error
from layerwise.allocators.owl import OWL, outlier_percentage
from layerwise.models.skeleton import Linear
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table, write_table
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


def is_measured(allocator: Allocator) -> bool:
    """Return whether the allocator measures the model; the others only use the depth of a layer."""
    return isinstance(allocator, OWL | AlphaPruning | DSA | DLP | LSA)


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
) -> Artifact:
    """Compute one score for every decoder layer, or for every part of it (``units_of``).

    Args:
        grams: for an allocator that uses second moments.
        granularity: what gets a score.
        linears: the prunable linears, by layer.

    Returns:
        An artifact with ``scores.parquet``; columns: layer, linear (name of the linear or expert; null for a score of the layer),
        score.
    """
    stage = measure_stage(checkpoint, capture, grams, allocator, granularity, linears)

    def build(draft: Draft) -> None:
        rows: list[dict[str, object]] = []
        first = 0
        if draft.resumed is not None:
            first = draft.resumed.step
            rows += json.loads(store.read(draft.resumed.state, ROWS_FILE))

        def write_rows(state: Draft) -> None:
            state.write(ROWS_FILE, json.dumps(rows).encode())

        title = f"measure: {allocator.method}"
        with (
            boundaries(draft, execution, write_rows) as reached,
            showing(title, checkpoint.num_layers, first, draft.resumed) as show,
        ):
            for index, weights in enumerate(checkpoint.layers(first, execution.torch_device), first):
                layer = linears[index]
                oriented = {
                    linear.name: linear.oriented(weights[linear.weight_name]).to(execution.torch_device)
                    for linear in layer
                }
                units = units_of([linear.name for linear in layer], granularity)
                of_units = [positions for _, positions in units]
                scores = _scores(store, capture, grams, allocator, index, oriented, of_units)
                names = [name for name, _ in units]
                rows += [
                    {"layer": index, "linear": name, "score": score}
                    for name, score in zip(names, scores, strict=True)
                ]
                show(index + 1)
                reached(index + 1)
        schema = pa.schema({"layer": pa.int64(), "linear": pa.string(), "score": pa.float64()})
        write_table(draft, SCORES_FILE, pa.Table.from_pylist(rows, schema=schema))

    return store.get_or_build(stage, build)


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
    wanda = [
        weight.abs().float() * statistics[name].norms.to(weight.device) for name, weight in weights.items()
    ]
    of_some = _measurement(allocator)
    return [of_some([wanda[position] for position in unit]) for unit in units]


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
