"""Input statistics as Parquet: one file per decoder layer, one row per linear and input channel."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from layerwise.calibration.few_tokens import (
    TOKENS_FOR_NORMS,
    statistics_to_prune_by,
    tokens_for_moments,
    tokens_of_experts,
)
from layerwise.calibration.statistics import InputStatistics
from layerwise.models.expert_names import expert_linear
from layerwise.models.skeleton import Linear
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table, write_table
from layerwise.tasks.lanes.prune_settings import PruneSettings

FOLDER = "statistics"


def statistics_identity(artifact: Artifact) -> str:
    """Return the digest of an artifact's statistics, without its other files, as input key for lanes and measurements."""
    return digest({n: file.digest for n, file in artifact.files.items() if n.startswith(f"{FOLDER}/")})


def write_statistics(
    draft: Draft, layer: int, statistics: Mapping[str, InputStatistics], folder: str = FOLDER
) -> None:
    """Write the statistics of one layer; columns: layer, linear, channel, tokens (count), sum_of_squares (float64)."""
    channels = [len(inputs.sum_of_squares) for inputs in statistics.values()]
    rows = {
        "layer": pa.array(np.full(sum(channels), layer, dtype=np.int16)),
        "linear": pa.DictionaryArray.from_arrays(
            np.repeat(np.arange(len(channels), dtype=np.int32), channels), pa.array(list(statistics))
        ),
        "channel": pa.array(np.concatenate([np.arange(count, dtype=np.int32) for count in channels])),
        "tokens": pa.array(np.repeat([inputs.tokens for inputs in statistics.values()], channels)),
        "sum_of_squares": pa.array(torch.cat([i.sum_of_squares for i in statistics.values()]).numpy()),
    }
    write_table(draft, f"{folder}/{_file(layer)}", pa.table(rows))
    if tokens := tokens_of_experts(statistics):
        draft.write(f"{folder}/{_tokens_file(layer)}", json.dumps(tokens).encode())


def read_statistics(store: ArtifactStore, artifact: Artifact, layer: int) -> dict[str, InputStatistics]:
    """Read the statistics of one layer to prune by, by linear, in the order they were written.

    Experts that few tokens reached have others' statistics, see ``statistics_to_prune_by``.
    """
    return statistics_to_prune_by(read_collected(store, artifact, layer))


def read_collected(store: ArtifactStore, artifact: Artifact, layer: int) -> dict[str, InputStatistics]:
    """Read the statistics of one layer as they were collected."""
    table = read_table(store, artifact, f"{FOLDER}/{_file(layer)}")
    linear = table["linear"].combine_chunks().dictionary_encode()
    indices, names = linear.indices.to_numpy(), linear.dictionary.to_pylist()
    sums = torch.from_numpy(table["sum_of_squares"].to_numpy().copy())
    tokens = table["tokens"].to_numpy()
    starts = np.flatnonzero(np.diff(indices, prepend=-1)).tolist()  # rows of a linear follow each other
    return {
        names[indices[start]]: InputStatistics(sums[start:end].clone(), int(tokens[start]))
        for start, end in zip(starts, [*starts[1:], len(indices)], strict=True)
    }


def expert_rows(
    store: ArtifactStore, artifact: Artifact, linears: Sequence[Sequence[Linear]], settings: PruneSettings
) -> list[dict[str, Any]]:
    """Return the calibration tokens of every expert of a mixture of experts; nothing for other models.

    Args:
        artifact: has the statistics that the model is pruned by.
        linears: the prunable linears, by layer.

    Returns:
        Rows with the layer, the name of the experts' module (``experts``), the ``tokens`` of each expert, and the numbers
        of those that are pruned by the inputs of all experts of the layer, because they got few (``pruned_by_all``).
    """
    rows = []
    for layer, of_layer in enumerate(linears):
        name = f"{FOLDER}/{_tokens_file(layer)}"
        if name not in artifact.files:
            continue
        needed: dict[str, int] = {}  # by the name of the expert
        for linear in of_layer:
            if settings.pruner.method != "magnitude" and (place := expert_linear(linear.name)) is not None:
                tokens = tokens_for_moments(linear.in_features) if settings.needs_grams else TOKENS_FOR_NORMS
                needed[place.name] = max(tokens, needed.get(place.name, 0))
        for pool, counts in json.loads(store.read(artifact, name)).items():
            few = [expert for expert, count in enumerate(counts) if count < needed.get(f"{pool}.{expert}", 0)]
            rows.append({"layer": layer, "experts": pool, "tokens": counts, "pruned_by_all": few})
    return rows


def _tokens_file(layer: int) -> str:
    return f"tokens-{layer:05d}.json"


def _file(layer: int) -> str:
    return f"layer-{layer:05d}.parquet"
