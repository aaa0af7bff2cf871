"""Zero-shot and few-shot: accuracy of the dense, uniform, best and distilled model of a search on tasks of lm-eval."""

from functools import cache
from typing import Annotated, Literal

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import Field

from layerwise.flows.orchestration.flow_frame import run_announced
from layerwise.flows.pipeline.artifact_by_key import artifact_by_key
from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.flows.pipeline.finished_search import reopen_search
from layerwise.flows.report import make_report
from layerwise.flows.runtime import Runtime
from layerwise.flows.setting_types import Settings
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import open_exported
from layerwise.tasks.lm_eval_tasks.comparison import (
    DISTILLED,
    ZeroShotComparison,
    compare_zero_shot,
    comparison_rows,
    store_comparison,
)
from layerwise.tasks.lm_eval_tasks.task_loading import load_tasks
from layerwise.tasks.pages.markdown import plain
from layerwise.tasks.results.distillation import DISTILL_STAGE, chosen_distilled, newest_distilled
from layerwise.tasks.results.roles import EVALUATE
from layerwise.tasks.results.search_result import read_search
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.progress import going_on_without_prefect
from layerwise.tasks.zero_shot import ZeroShotSettings, require_affordable
from layerwise.tasks.zero_shot import zero_shot as answer

# Tasks of the papers on Wanda and ATP.
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
    """Evaluate the models of a finished search on zero-shot and few-shot tasks."""

    search: str | None = Field(
        default=None,
        description="Key of the search, as `layerwise ls` prints it, or its beginning. Empty: the newest search.",
    )
    tasks: tuple[str, ...] = Field(
        default=TASKS,
        min_length=1,
        description="Names of tasks or groups of lm-eval, or YAML files with your own. A number of examples may follow, as in "
        "mmlu:5.",
    )
    fewshot: int | None = Field(
        title="Examples",
        default=None,
        ge=0,
        description="Number of examples in front of each document, for tasks without a number of their own in tasks. Tasks "
        "whose file says 0 get none. Empty: 5 for mmlu, 8 for gsm8k; as many as their file says for other tasks with "
        "generated answers; 0 for all others.",
    )
    documents: Annotated[int, Field(ge=1)] | None = Field(
        title="Documents of each task",
        default=None,
        description="Maximum number of documents of each task, drawn at random, the same for all models. Empty: all.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random draw of documents.")
    way: Literal["streamed", "memory"] = Field(
        default="streamed",
        description="How the model is run. streamed: one decoder layer at a time, with one pass over the weights for all "
        "tasks. memory: the whole model at once, with lm-eval's own code; needed for tasks with generated answers.",
    )
    trust_task_code: bool = Field(
        default=False,
        description="Run the Python code that your own YAML files refer to (!function, other metrics, other kinds of data "
        "sets). Set it only for files that you have read.",
    )


@flow(name="zero-shot", persist_result=False)
def zero_shot(settings: ZeroShot, runtime: Runtime) -> ZeroShotComparison:
    """Ask all models the same questions, compare the answers, and make the report of the search again.

    Answers in the store are reused. Safe to stop and start again.

    Raises:
        FileNotFoundError: There is no such store.
        KeyError: The store has no such search.
        ValueError: lm-eval does not know a task; a task's answers are not right or wrong; or they are generated, and the
            model is streamed.
        ImportError: lm-eval is not installed.
    """
    store, execution = runtime.open_existing_store(), runtime.execution()

    @cache  # chosen once: no other model takes the place of a damaged one
    def chosen() -> tuple[str, str | None]:
        search = read_search(store, artifact_by_key(store, settings.search))
        distilled = newest_distilled(store.artifacts(f"{DISTILL_STAGE}/"), search.stages[EVALUATE])
        return search.artifact.key, None if distilled is None else distilled.key

    def compared() -> ZeroShotComparison:
        search, distilled = chosen()
        return compare_models(store, settings.model_copy(update={"search": search}), execution, distilled)

    title = f"zero-shot: {', '.join(settings.tasks)}"
    return run_announced(store, title, lambda: rebuild_damaged(store, compared))


def compare_models(
    store: ArtifactStore, settings: ZeroShot, execution: Execution, distilled_key: str | None = None
) -> ZeroShotComparison:
    """Let the models of a finished search answer the tasks, and make the report of the search again.

    Args:
        distilled_key: key of a distilled model of the search that answers too.
    """
    loaded = load_tasks(
        settings.tasks, settings.documents, settings.seed, settings.trust_task_code, settings.fewshot
    )
    questions, groups = loaded.questions, loaded.groups
    finished = reopen_search(store, settings.search, execution)
    captured, uniform = finished.scored.captured, finished.scored.uniform
    how = ZeroShotSettings(captured.pruning.dtype, settings.way)
    require_affordable(captured.checkpoint, questions, how)
    lanes = {"uniform": uniform, "best": finished.best}
    if finished.best == uniform:
        del lanes["uniform"]
    models = {"dense": captured.checkpoint}
    models |= {name: finished.checkpoint(store, lane, execution) for name, lane in lanes.items()}
    if finished.settings.recover is not None:
        models["pruned"] = finished.checkpoint_without_recovery(store, execution)
    distilled = None if distilled_key is None else chosen_distilled(store, distilled_key)
    if distilled is not None:
        models[DISTILLED] = open_exported(store, distilled)
    answers = {
        name: answer(store, checkpoint, questions, how, execution) for name, checkpoint in models.items()
    }
    comparison = compare_zero_shot(
        store,
        answers["dense"],
        answers.get("uniform"),
        answers["best"],
        answers.get("pruned"),
        groups,
        answers.get(DISTILLED),
    )
    table = store_comparison(store, finished.search.artifact, answers, comparison, groups, distilled)
    make_report(store.url, finished.search.artifact.key, table=table)
    with going_on_without_prefect():
        title = f"{plain(finished.settings.title)}: accuracy on tasks in per cent"
        create_table_artifact(comparison_rows(comparison), key="zero-shot", description=title)
    return comparison
