"""Distill: train the weights that a finished search kept, so that the pruned model's output follows the dense one's."""

from dataclasses import replace
from typing import Annotated

from prefect import flow
from pydantic import Field

from layerwise.flows.orchestration.flow_frame import run_announced
from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.flows.pipeline.finished_search import ReopenedSearch, reopen_search
from layerwise.flows.pipeline.graph import sample_windows
from layerwise.flows.report import make_report
from layerwise.flows.runtime import Runtime
from layerwise.flows.setting_types import Settings
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.recovery.distill import DistillInputs, require_distillable
from layerwise.tasks.recovery.distill import distill as distill_export
from layerwise.tasks.recovery.student import DistillSettings
from layerwise.tasks.results.roles import EVALUATE
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.sample_tokens import require_responses
from layerwise.tasks.texts.token_windows import shape_of


class Distill(Settings):
    """Train the weights that a finished search kept towards the output of the dense model."""

    search: str | None = Field(
        default=None,
        description="Key of the search, as `layerwise ls` prints it, or its beginning. Empty: the newest search.",
    )
    steps: int = Field(default=64, ge=1, description="Number of changes of the weights.")
    learning_rate: float = Field(
        default=2e-3,
        gt=0,
        le=1,
        description="Largest step size of AdamW, relative to the root mean square of the kept weights of each linear. It "
        "rises during the first tenth of the steps, and then falls like a cosine.",
    )
    batch: int = Field(
        title="Windows per step",
        default=1,
        ge=1,
        description="Number of windows per step. With more of them, a higher learning rate can be used.",
    )
    windows: Annotated[int, Field(ge=2)] | None = Field(
        title="Calibration windows",
        default=None,
        description="Number of windows to draw from the calibration text. Empty: the windows that the search was "
        "calibrated on. More windows are better.",
    )
    held_out: int = Field(
        title="Held-out windows",
        default=8,
        ge=1,
        description="Number of the windows that are not trained on; the best weights are chosen on them.",
    )
    evaluate_every: int = Field(
        title="Steps between evaluations",
        default=16,
        ge=1,
        description="Number of steps between evaluations on the held-out windows.",
    )
    patience: int = Field(
        default=4,
        ge=1,
        description="Stop after this number of evaluations without an improvement.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the order of the windows.")

    @property
    def training(self) -> DistillSettings:
        """The settings of the training, without those that decide what is trained on."""
        return DistillSettings(**self.model_dump(exclude={"search", "windows"}))


@flow(name="distill", persist_result=False)
def distill(settings: Distill, runtime: Runtime) -> Artifact:
    """Distill the pruned model of a finished search, and make the report of the search again.

    Exports the pruned checkpoint first if the search has not. Safe to stop and start again.

    Returns:
        The artifact of the distilled checkpoint, see ``layerwise.tasks.results.distillation.read_distillation``.

    Raises:
        FileNotFoundError: There is no such store.
        KeyError: The store has no such search.
        ValueError: There is too little memory for the model, or there are too few windows.
    """
    store, execution = runtime.open_existing_store(), runtime.execution()
    return run_announced(
        store, "distill", lambda: rebuild_damaged(store, lambda: _distilled(store, settings, execution))
    )


def _distilled(store: ArtifactStore, settings: Distill, execution: Execution) -> Artifact:
    finished = reopen_search(store, settings.search, execution)
    before = finished.scored.captured
    require_distillable(before.checkpoint)
    settings.training.require_windows(settings.windows or shape_of(before.windows["calibration"])[0])
    calibration = _calibration(store, finished, settings.windows)
    exported = finished.exported(store, finished.best, execution)
    inputs = DistillInputs(
        before.checkpoint,
        exported,
        calibration,
        before.windows["test"],
        finished.search.stages[EVALUATE],
        before.pruning.dtype,
        before.pruning.calibrate_on,
    )
    # The results of the search are not of the distilled model.
    card, section = replace(finished.card(store, exported), results=()), finished.recovery_section
    folder = distill_export(store, inputs, settings.training, card, execution, section)
    make_report(store.url, finished.search.artifact.key)
    return folder


def _calibration(store: ArtifactStore, finished: ReopenedSearch, windows: int | None) -> Artifact:
    """Return the windows to train on. They never share tokens with the selection and the test windows."""
    if windows is None:
        return finished.scored.captured.windows["calibration"]
    texts = finished.inputs.texts
    request = texts.requests["calibration"].with_windows(windows)
    texts.require_windows(request)
    checkpoint = finished.scored.captured.checkpoint
    if finished.settings.calibrate_on == "responses":
        require_responses(store, checkpoint.tokenizer, checkpoint.encoding_identity, request)
    return sample_windows(store, checkpoint, request)
