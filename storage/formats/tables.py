"""Arrow tables as Parquet files inside an artifact."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore


def write_table(draft: Draft, name: str, table: pa.Table) -> None:
    """Write ``table`` as zstd-compressed Parquet."""
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
    """Read a table, or part of it; the digest of the whole file is checked first.

    Args:
        columns: which ones; all if None.
        filters: as for ``pyarrow.parquet.read_table``, such as ``[("layer", "==", 3)]``.

    Raises:
        KeyError: if the artifact has no such file.
        Corrupt: if the file is missing or not what was written.
    """
    content = pa.BufferReader(store.read(artifact, name))
    return pq.read_table(content, columns=None if columns is None else list(columns), filters=filters)
