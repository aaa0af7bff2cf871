"""Input statistics as Parquet: one file per decoder layer, one row per linear and input channel."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch

from layerwise.calibration.few_tokens import statistics_to_prune_by
from layerwise.calibration.statistics import InputStatistics
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table, write_table

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
        "linear": pa.array(np.repeat(list(statistics), channels)).dictionary_encode(),
        "channel": pa.array(np.concatenate([np.arange(count, dtype=np.int32) for count in channels])),
        "tokens": pa.array(np.repeat([inputs.tokens for inputs in statistics.values()], channels)),
        "sum_of_squares": pa.array(torch.cat([i.sum_of_squares for i in statistics.values()]).numpy()),
    }
    write_table(draft, f"{folder}/{_file(layer)}", pa.table(rows))


def read_statistics(store: ArtifactStore, artifact: Artifact, layer: int) -> dict[str, InputStatistics]:
    """Read the statistics of one layer to prune by, by linear, in the order they were written.

    Experts that few tokens reached have others' statistics, see ``statistics_to_prune_by``.
    """
    return statistics_to_prune_by(read_collected(store, artifact, layer))


def read_collected(store: ArtifactStore, artifact: Artifact, layer: int) -> dict[str, InputStatistics]:
    """Read the statistics of one layer as they were collected."""
    table = read_table(store, artifact, f"{FOLDER}/{_file(layer)}")
    linears = table["linear"].combine_chunks().to_pylist()
    sums = torch.from_numpy(table["sum_of_squares"].to_numpy().copy())
    tokens = table["tokens"].to_numpy()
    starts = [index for index, name in enumerate(linears) if index == 0 or name != linears[index - 1]]
    return {
        linears[start]: InputStatistics(sums[start:end].clone(), int(tokens[start]))
        for start, end in zip(starts, [*starts[1:], len(linears)], strict=True)
    }


def _file(layer: int) -> str:
    return f"layer-{layer:05d}.parquet"
