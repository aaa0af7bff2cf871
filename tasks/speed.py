"""Speed: how fast the exported model runs on this machine's CPU, dense and packed, side by side."""

import json
from dataclasses import asdict
from importlib.metadata import version

import torch

from layerwise.display.byte_size import size_in
from layerwise.scoring.perplexity import format_perplexity
from layerwise.sparse.native import kernel
from layerwise.sparse.speed import Speed, SpeedTable, measure_speed
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
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sample_tokens import read_input_ids

SPEED_FILE = "speed.json"
SPEED_STAGE = "speed"
WINDOWS = 4  # of the test, for the perplexity of every way: enough to see what int8 loses


def speed_stage(exported: Artifact, windows: Artifact, settings: SpeedSettings, dtype: str) -> Stage:
    """The stage of a measurement. It is about a machine, and so the one stage whose key has it."""
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
    """Measure the search's exported model; on the same machine with the same packages once.

    Raises:
        ValueError: the search has exported no model.
    """
    exported, windows = search.stages.get("export"), search.stages["test"]
    if exported is None:
        raise ValueError(
            f"{search.artifact.key} has exported no model to be measured. Run the search with --export true: what it "
            "computed is not computed again."
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


def read_speed(store: ArtifactStore, artifact: Artifact) -> SpeedTable:
    """What an artifact of ``speed`` holds."""
    document = json.loads(store.read(artifact, SPEED_FILE))
    return SpeedTable(**{**document, "speeds": tuple(Speed(**row) for row in document["speeds"])})


def speed_rows(table: SpeedTable) -> list[dict[str, str | int]]:
    """The table for people."""
    return [
        {
            "way": each.way,
            "linears": each.linears,
            "weights, MB": size_in("MB", each.weight_bytes).removesuffix(" MB"),
            "new tokens/s": f"{each.decode:.3g}",
            "x torch float32": "" if each.to_float32 is None else f"{each.to_float32:.2f}",
            "x torch bfloat16": "" if each.to_bfloat16 is None else f"{each.to_bfloat16:.2f}",
            "of memory's limit": f"{100 * each.of_limit:.0f} %",
            "prompt tokens/s": f"{each.prefill:.3g}",
            "perplexity": "" if each.perplexity is None else format_perplexity(each.perplexity),
        }
        for each in table.speeds
    ]


def speed_sentence(table: SpeedTable) -> str:
    """On what machine, and what was not measured."""
    level = "no sparse kernel" if table.level is None else f"sparse kernel at {table.level}"
    threads = f"{table.threads} thread{'' if table.threads == 1 else 's'}"
    left_out = "".join(f" {way}: {reason}." for way, reason in table.left_out.items())
    return (
        f"On {table.cpu}, {threads}, {level}, memory read at {size_in('GB', table.bandwidth, 1)}/s; one text "
        f"at a time.{left_out}"
    )
