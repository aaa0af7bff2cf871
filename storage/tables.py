"""Arrow tables as Parquet files of an artifact."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore


def write_table(draft: Draft, name: str, table: pa.Table) -> None:
    """Write ``table`` as Parquet compressed with zstd."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    draft.write(name, [memoryview(sink.getvalue())])


def read_table(
    store: ArtifactStore,
    artifact: Artifact,
    name: str,
    columns: Sequence[str] | None = None,
    filters: object = None,
) -> pa.Table:
    """Read a table, or a part of it, after checking the digest of the whole file.

    Args:
        columns: names of the columns to read; None for all.
        filters: as for ``pyarrow.parquet.read_table``, such as ``[("layer", "==", 3)]``.

    Raises:
        KeyError: the artifact has no such file.
        Corrupt: the file is missing or differs from what was written.
    """
    content = pa.BufferReader(store.read(artifact, name))
    return pq.read_table(content, columns=None if columns is None else list(columns), filters=filters)
