"""Tables are read as they were written."""

import pyarrow as pa
import pytest

from layerwise.storage.files.errors import Corrupt
from layerwise.storage.stage import Stage
from layerwise.storage.tables import read_table, write_table

STAGE = Stage("capture", version=1)
TABLE = pa.table({"layer": pa.array([0, 0, 1], pa.int16()), "sum_of_squares": [0.5, 1.5, 2.5]})


def write(store):
    return store.get_or_build(STAGE, lambda draft: write_table(draft, "statistics.parquet", TABLE))


def test_a_table_is_read_with_its_types(store):
    assert read_table(store, write(store), "statistics.parquet").equals(TABLE)


def test_columns_and_rows_can_be_selected(store):
    chosen = read_table(store, write(store), "statistics.parquet", ["sum_of_squares"], [("layer", "==", 1)])
    assert chosen.to_pydict() == {"sum_of_squares": [2.5]}


def test_a_flipped_byte_is_detected_before_the_table_is_read(store):
    artifact = write(store)
    path = f"{store.root}/{artifact.files['statistics.parquet'].path}"
    content = bytearray(store.fs.cat_file(path))
    content[10] ^= 1
    store.fs.pipe_file(path, bytes(content))
    with pytest.raises(Corrupt, match=r"statistics\.parquet"):
        read_table(store, artifact, "statistics.parquet")
