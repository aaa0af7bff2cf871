"""Bench: the speed of a model in a folder, and of a search, whose report and model card then show it."""

import re
import shutil
import sys

import pytest

from layerwise.flows.bench import bench
from layerwise.flows.cli import main as cli
from layerwise.flows.compress import Compress, compress
from layerwise.flows.runtime import Runtime
from layerwise.flows.search import search
from layerwise.sparse import accelerate
from layerwise.sparse.engines import BFLOAT16, SPARSE
from layerwise.sparse.native import kernel
from layerwise.sparse.speed_settings import SpeedSettings
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.garbage import keys_of_results

QUICK = SpeedSettings(prompt_tokens=5, new_tokens=3, rounds=1)
OPTIONS = ["--prompt-tokens", "5", "--new-tokens", "3", "--rounds", "1"]


@pytest.fixture(scope="module")
def done(workshop, prefect_backend, tmp_path_factory):
    """A finished search and its runtime; its own store, as its reports are made again."""
    runtime = Runtime(store=str(tmp_path_factory.mktemp("bench") / "store"))
    return search(workshop.settings(), runtime), runtime


@pytest.fixture(autouse=True)
def any_size_gains(monkeypatch) -> None:
    """Pack the small linears of this test as if they were large."""
    if kernel() is None:
        pytest.skip("the sparse kernel was not built")
    monkeypatch.setattr(accelerate, "LEAST_WEIGHTS", 1)


def test_a_search_is_measured_once_and_its_report_and_card_show_the_speed(done):
    result, runtime = done
    store = ArtifactStore(runtime.store)
    table, page = bench(runtime.store, result.artifact.key, QUICK)
    sparse = next(each for each in table.speeds if each.way == SPARSE)
    dense = next(each for each in table.speeds if each.way == BFLOAT16)
    assert sparse.perplexity == pytest.approx(dense.perplexity, rel=0.02)
    html = store.fs.cat_file(page).decode()
    assert "Speed on a CPU" in html
    assert f"<td>{sparse.decode:.3g}</td>" in html
    assert bench(runtime.store, result.artifact.key, QUICK) == (table, page)
    card = store.read(compress(Compress(search=result.artifact.key), runtime), "README.md").decode()
    assert f"| {SPARSE} |" in card
    measured = [each.key for each in store.artifacts() if each.recipe["name"] == "speed"]
    assert len(measured) == 1
    assert set(measured) <= keys_of_results(list(store.artifacts()))


def test_folders_with_and_without_zeros_are_measured(done, monkeypatch, capsys):
    result, runtime = done
    store = ArtifactStore(runtime.store)
    smaller = store.location(compress(Compress(search=result.artifact.key), runtime))
    tables = [bench(folder, None, QUICK)[0] for folder in (result.pruned, smaller)]
    assert tables[0].speeds[0].weight_bytes == tables[1].speeds[0].weight_bytes
    monkeypatch.setattr(sys, "argv", ["layerwise", "bench", smaller, *OPTIONS])
    cli.main()
    shown = capsys.readouterr().out
    assert "x torch bfloat16" in shown
    assert re.search(r"threads?, sparse kernel at", shown)
    assert "Report" not in shown


def test_a_folder_without_model_and_search_is_refused(done, tmp_path):
    result, runtime = done
    with pytest.raises(KeyError, match="holds no finished search"):
        bench(str(tmp_path), None, QUICK)
    with pytest.raises(ValueError, match=r"is a checkpoint, not a store .* Leave out the key"):
        bench(result.pruned, result.artifact.key, QUICK)


def test_a_model_that_a_search_would_refuse_is_refused(workshop, tmp_path):
    folder = shutil.copytree(workshop.model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle files and similar formats can run code"):
        bench(str(folder), None, QUICK)
