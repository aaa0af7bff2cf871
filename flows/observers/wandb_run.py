"""Run of Weights & Biases for one search. Its own variables (``WANDB_PROJECT``, ``WANDB_MODE``) choose where it goes."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence

from layerwise.flows.observers.search_tracker import KEY_TAG, SECONDS_PER_REQUEST, EndState, Metric

PROJECT = "layerwise"
FINISH_SECONDS = 60.0  # that a search waits at its end for what is not sent yet
SERIES = ("layer_sparsity", "layer_error")  # metrics with a value for every layer


class WandbRun:
    """Implements ``TrackedRun``."""

    def __init__(self, search: str, title: str) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        quiet = wandb.Settings(
            console="off", silent=True, init_timeout=3 * SECONDS_PER_REQUEST, x_disable_stats=True
        )
        if hasattr(
            quiet, "finish_timeout"
        ):  # not in older versions; by default, it waits for the server without limit
            quiet.finish_timeout, quiet.finish_timeout_raises = FINISH_SECONDS, True
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=search,
            name=title,
            resume="allow",
            settings=quiet,
        )
        for name in SERIES:
            self._run.define_metric(name, step_metric="layer")

    @property
    def key(self) -> str:
        return str(self._run.config.get(KEY_TAG, ""))

    def log(self, params: Mapping[str, str], tags: Mapping[str, str], metrics: Sequence[Metric]) -> None:
        by_layer: dict[int, dict[str, float]] = defaultdict(dict)
        for each in metrics:
            if each.name in SERIES:
                by_layer[each.step][each.name] = each.value
            else:
                self._run.summary[each.name] = each.value
        for layer, values in by_layer.items():
            self._run.log({"layer": layer, **values})
        self._run.config.update({**params, **tags}, allow_val_change=True)

    def log_file(self, name: str, content: bytes) -> None:
        import wandb

        artifact = wandb.Artifact(f"{name.partition('.')[0]}-{self._run.id}", type="layerwise")
        with artifact.new_file(name, mode="wb") as file:
            file.write(content)
        self._run.log_artifact(artifact)

    def end(self, state: EndState) -> None:
        self._run.finish(exit_code=0 if state == "finished" else 1)
