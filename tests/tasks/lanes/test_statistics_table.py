"""Statistics table: statistics are read as they were written; one row per channel."""

import torch

from layerwise.calibration.statistics import InputStatistics
from layerwise.storage.stage import Stage
from layerwise.storage.tables import read_table
from layerwise.storage.tensors import write_tensors
from layerwise.tasks.lanes.statistics_table import read_statistics, statistics_identity, write_statistics

# Linears of different widths, one with a single channel, one with another number of tokens.
STATISTICS = {
    "attention.q": InputStatistics(torch.tensor([1.5, 0.0, 1e300], dtype=torch.float64), 7),
    "attention.k": InputStatistics(torch.tensor([1 / 3], dtype=torch.float64), 7),
    "mlp.down": InputStatistics(torch.tensor([2.0, 4.0], dtype=torch.float64), 2**40),
}


def stored(store, statistics=STATISTICS, layer=3, extra=None, name="test"):
    def build(draft):
        write_statistics(draft, layer, statistics)
        if extra is not None:
            write_tensors(draft, "extra.safetensors", {"tensor": extra})

    return store.get_or_build(Stage(name, 1, repr((layer, extra))), build)


def test_statistics_are_read_as_they_were_written(store):
    found = read_statistics(store, stored(store), 3)
    assert list(found) == list(STATISTICS)
    for name, expected in STATISTICS.items():
        assert found[name].tokens == expected.tokens
        assert found[name].sum_of_squares.dtype == torch.float64
        assert torch.equal(found[name].sum_of_squares, expected.sum_of_squares)


def test_read_statistics_can_be_added_to(local_store):
    (first, *_) = read_statistics(local_store, stored(local_store), 3).values()
    first.add(torch.ones(3), tokens=1)
    assert first.tokens == 8


def test_a_row_is_one_channel_of_one_linear(local_store):
    rows = read_table(local_store, stored(local_store), "statistics/layer-00003.parquet").to_pylist()
    assert len(rows) == 6
    assert rows[4] == {"layer": 3, "linear": "mlp.down", "channel": 0, "tokens": 2**40, "sum_of_squares": 2.0}


def test_layers_and_lanes_have_separate_files(local_store):
    def build(draft):
        write_statistics(draft, 0, STATISTICS)
        write_statistics(draft, 1, STATISTICS)
        write_statistics(draft, 1, {"mlp.down": STATISTICS["mlp.down"]}, "lane-004/statistics")

    artifact = local_store.get_or_build(Stage("test", 1), build)
    assert set(artifact.files) == {
        "statistics/layer-00000.parquet",
        "statistics/layer-00001.parquet",
        "lane-004/statistics/layer-00001.parquet",
    }
    of_lane = read_table(local_store, artifact, "lane-004/statistics/layer-00001.parquet")
    assert set(of_lane["linear"].to_pylist()) == {"mlp.down"}


def test_the_identity_of_statistics_ignores_other_files(local_store):
    plain = stored(local_store)
    assert statistics_identity(stored(local_store, extra=torch.ones(1))) == statistics_identity(plain)
    others = {"mlp.down": InputStatistics(torch.tensor([2.0, 4.0], dtype=torch.float64), 5)}
    assert statistics_identity(stored(local_store, others, name="other")) != statistics_identity(plain)
    assert statistics_identity(stored(local_store, layer=4)) != statistics_identity(plain)
