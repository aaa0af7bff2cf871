"""Bench: measure the speed of a checkpoint on this machine, in a folder or exported by a search."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from layerwise.flows.pipeline.artifact_by_key import artifact_by_key
from layerwise.flows.report import make_report
from layerwise.sparse.speed import SpeedTable, measure_speed
from layerwise.sparse.speed_settings import SpeedSettings
from layerwise.storage.existing_store import existing_store
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.tasks.compressed.checkpoint import load
from layerwise.tasks.models.dtype_speed import fast_dtype
from layerwise.tasks.models.model_in_folder import model_in_folder
from layerwise.tasks.models.streamed import DTYPES
from layerwise.tasks.results.search_result import read_search
from layerwise.tasks.results.speed_table import read_speed
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.sources.checkpoint_files import CONFIG, DESCRIPTION_FILE
from layerwise.tasks.sources.folder import list_folder
from layerwise.tasks.speed import speed


def bench(model: str, key: str | None, settings: SpeedSettings) -> tuple[SpeedTable, str | None]:
    """Measure the speed of a model. For a search, also commit the measurement and make the report again.

    Args:
        model: folder of a checkpoint, with its zeros or compressed; or a store.
        key: key of a search in the store or its beginning; None for the newest search.

    Returns:
        The speeds, and the location of the search's report; None for a checkpoint in a folder.

    Raises:
        KeyError: the store has no such search.
        FileNotFoundError: there is neither a checkpoint nor a store.
        ValueError: the search has not exported a model, a key is given for a checkpoint, or the folder holds a model
            that a search would refuse.
    """
    folder = Path(model)
    if (folder / CONFIG).exists():
        if key is not None:
            raise ValueError(
                f"{model} is a checkpoint, not a store with searches, but the key {key} is given. Leave out the key."
            )
        return measure_speed(_model_in(folder), settings), None
    store = existing_store(model)
    search = read_search(store, artifact_by_key(store, key))
    measured = speed.fn(store, search, settings)
    return read_speed(store, measured), make_report(store.url, search.artifact.key)


def _model_in(folder: Path) -> PreTrainedModel:
    dtype = DTYPES[fast_dtype(Execution())]
    if not (folder / DESCRIPTION_FILE).exists():
        return model_in_folder(list_folder(*open_filesystem(str(folder)), name=str(folder)), dtype)
    compressed: Any = load(folder)  # the type hints of PreTrainedModel.to do not accept a dtype
    loaded = compressed.to(dtype)
    assert isinstance(loaded, PreTrainedModel)
    return loaded
