"""Zero-shot: how the dense, the uniform and the chosen model of a finished search answer the tasks of lm-eval."""

from typing import Annotated, Literal, cast

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.exceptions import CancelledRun, TerminationSignal
from pydantic import Field

from layerwise.flows.orchestration.cancellation import cancelled
from layerwise.flows.pipeline.damage_repair import mending
from layerwise.flows.pipeline.finished_search import reopen
from layerwise.flows.pipeline.time_budget import refuse_minutes
from layerwise.flows.report import make_report
from layerwise.flows.runtime import Runtime
from layerwise.flows.setting_types import Settings
from layerwise.storage.existing_store import existing_store
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.signs_of_life import announced
from layerwise.tasks.lm_eval_tasks.comparison import (
    ZeroShotComparison,
    compare_zero_shot,
    comparison_rows,
    store_comparison,
)
from layerwise.tasks.lm_eval_tasks.task_loading import load_questions
from layerwise.tasks.pages.markdown import plain
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.progress import going_on_without_prefect
from layerwise.tasks.running.stopping import stopping_on_sigterm
from layerwise.tasks.zero_shot import ZeroShotSettings
from layerwise.tasks.zero_shot import zero_shot as answer

# Those of the papers on Wanda and ATP.
TASKS = (
    "boolq",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "rte",
)


class ZeroShot(Settings):
    """Ask the models of a finished search the questions of zero-shot tasks."""

    search: str | None = Field(
        default=None,
        description="Key of the search, as `layerwise ls` prints it, or its beginning; empty: the newest.",
    )
    tasks: tuple[str, ...] = Field(
        default=TASKS,
        min_length=1,
        description="Names of lm-eval's tasks, or YAML files with tasks of your own.",
    )
    documents: Annotated[int, Field(ge=1)] | None = Field(
        title="Documents of each task",
        default=None,
        description="At most so many of each task, drawn at random, the same for all models; empty: all.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of that draw.")
    way: Literal["streamed", "memory"] = Field(
        default="streamed",
        description="streamed: one decoder layer at a time, one pass over the weights for all tasks. memory: the whole "
        "model at once, by lm-eval's own computation.",
    )
    trust_task_code: bool = Field(
        default=False,
        description="Run the Python code that YAML files of your own ask for (!function, other metrics, data sets of "
        "other kinds). Set it only for files that you have read.",
    )


@flow(name="zero-shot", persist_result=False)
def zero_shot(settings: ZeroShot, runtime: Runtime) -> ZeroShotComparison:
    """Ask all models the same questions, compare the answers, and make the search's report again.

    What was answered before is not asked again; safe to stop and start again.

    Raises:
        FileNotFoundError: there is no such store.
        KeyError: there is no such search in the store.
        ValueError: a task that lm-eval does not know, or that is not decided by log-probabilities; a limit of time.
        ImportError: lm-eval is not installed.
    """
    refuse_minutes(runtime, "zero-shot")
    store = existing_store(runtime.store)
    with stopping_on_sigterm(), announced(store.fs, store.root, f"zero-shot: {', '.join(settings.tasks)}"):
        try:
            execution = runtime.execution()
            return mending(store, lambda: _answered(store, settings, execution))
        except (CancelledRun, TerminationSignal) as ending:
            return cast(ZeroShotComparison, cancelled(ending))


def _answered(store: ArtifactStore, settings: ZeroShot, execution: Execution) -> ZeroShotComparison:
    questions = load_questions(settings.tasks, settings.documents, settings.seed, settings.trust_task_code)
    finished = reopen(store, settings.search, execution)
    how = ZeroShotSettings(finished.captured.pruning.dtype, settings.way)
    lanes = {"uniform": finished.uniform, "best": finished.best}
    if finished.best == finished.uniform:
        del lanes["uniform"]
    models = {"dense": finished.captured.checkpoint}
    models |= {name: finished.checkpoint(store, lane, execution) for name, lane in lanes.items()}
    answers = {
        name: answer(store, checkpoint, questions, how, execution) for name, checkpoint in models.items()
    }
    comparison = compare_zero_shot(store, answers["dense"], answers.get("uniform"), answers["best"])
    table = store_comparison(store, finished.search.artifact, answers, comparison)
    make_report(store.url, finished.search.artifact.key, table=table)
    with going_on_without_prefect():
        title = f"{plain(finished.settings.title)}: zero-shot accuracy in per cent"
        create_table_artifact(comparison_rows(comparison), key="zero-shot", description=title)
    return comparison
