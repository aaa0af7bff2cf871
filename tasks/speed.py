"""Speed: measure how fast the exported model runs on this machine's CPU, dense and packed."""

import json
from dataclasses import asdict
from importlib.metadata import version

import torch

from layerwise.sparse.native import kernel
from layerwise.sparse.speed import measure_speed
from layerwise.sparse.speed_settings import SpeedSettings
from layerwise.sparse.timing import cpu_name
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import open_exported
from layerwise.tasks.models.dtype_speed import fast_dtype
from layerwise.tasks.models.whole_model import whole_model
from layerwise.tasks.results.search_result import FinishedSearch
from layerwise.tasks.results.speed_table import SPEED_FILE, SPEED_STAGE
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.texts.token_windows import read_input_ids

WINDOWS = 4  # of the test, to compute the perplexity of every way: enough to see the loss of int8


def speed_stage(exported: Artifact, windows: Artifact, settings: SpeedSettings, dtype: str) -> Stage:
    """Describe a measurement. It is the only stage whose key contains the machine, because it measures the machine."""
    native = kernel()
    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "level": native.level if native else None,
        "torch": version("torch"),
        "dtype": dtype,
    }
    return Stage(
        SPEED_STAGE,
        1,
        {**asdict(settings), **machine},
        {"export": exported.key, "windows": windows.content},
    )


@stage_task(about=lambda search, **_: search.source)
def speed(store: ArtifactStore, search: FinishedSearch, settings: SpeedSettings) -> Artifact:
    """Measure the exported model of a search, once per machine and set of packages.

    Raises:
        ValueError: the search did not export a model.
    """
    exported, windows = search.stages.get("export"), search.stages["test"]
    if exported is None:
        raise ValueError(
            f"{search.artifact.key} did not export a model, so there is nothing to measure. Run the search again with "
            "--export true; finished stages are reused."
        )

    execution = Execution()
    dtype = fast_dtype(execution)

    def build(draft: Draft) -> None:
        checkpoint = open_exported(store, exported)
        model = whole_model(checkpoint, dtype, execution)
        table = measure_speed(model, settings, read_input_ids(store, windows)[:WINDOWS])
        draft.write(SPEED_FILE, json.dumps(asdict(table), indent=1).encode())
        draft.facts |= {each.way: f"{each.decode:.4g} tokens/s" for each in table.speeds}

    return store.get_or_build(speed_stage(exported, windows, settings, dtype), build)
