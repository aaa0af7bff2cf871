"""Search: find the beta that serves a model best at one overall sparsity, and export the model pruned by it."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from prefect import flow
from prefect.artifacts import create_link_artifact, create_table_artifact

from flows.mending import mending
from flows.settings import Runtime, Search
from layerwise.perplexity import DIVERGED
from storage.artifact import Artifact
from storage.draft import Draft
from storage.running import announced
from storage.stage import Stage
from storage.store import ArtifactStore
from tasks.allocate import allocate, read_plans
from tasks.branch import branch
from tasks.capture import DENSE_PERPLEXITY, CaptureSettings, capture
from tasks.checkpoint import Checkpoint
from tasks.corpora import assign_parts, open_corpus
from tasks.documents import Role
from tasks.evaluate import TestResult, evaluate, read_test
from tasks.execution import Execution
from tasks.export import export
from tasks.import_checkpoint import import_checkpoint, import_stage, inspect_source
from tasks.lane_group import LaneInputs
from tasks.progress import going_on_without_prefect
from tasks.sample_tokens import TokenRequest, sample_tokens
from tasks.select import Selection, read_selection, select
from tasks.stage_task import stage_task
from tasks.stopping import stopping_on_sigterm
from tasks.streamed import layer_sizes_of, linears_by_layer

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"
RESULT_STAGE = "search"


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and what it took.

    Attributes:
        pruned: where the exported checkpoint lies.
        stages: every artifact of the run by role.
        built: roles of the artifacts that this run had to build; the others were in the store.
        bytes_read: bytes of weights that this run read.
    """

    settings: Search
    source: str
    selection: Selection
    test: TestResult
    pruned: str
    stages: Mapping[str, Artifact]
    built: tuple[str, ...]
    bytes_read: int


@flow(name="search", flow_run_name="{settings.model} at {settings.sparsity}", persist_result=False)
def search(settings: Search, runtime: Runtime) -> SearchResult:
    """Prune ``settings.model`` with every beta, choose the best, export and test it. Safe to stop and start again."""
    store = ArtifactStore(runtime.store)
    execution = runtime.execution()
    what = f"search: {settings.model} at sparsity {settings.sparsity:g}"
    with stopping_on_sigterm(), announced(store.fs, store.root, what):
        return mending(store, lambda: run_stages(store, settings, execution))


def run_stages(store: ArtifactStore, settings: Search, execution: Execution) -> SearchResult:
    """The stages of a search, one after the other; those that the store has are not run again."""
    requests = token_requests(settings)
    checkpoint = load_checkpoint(store, settings)
    windows = sample_windows(store, checkpoint, requests)
    linears = linears_by_layer(checkpoint.index, settings.seqlen)
    dtype = checkpoint.index.dtype if settings.dtype == "auto" else settings.dtype
    pruning = settings.pruning(dtype)

    allocation = allocate(store, layer_sizes_of(linears), settings.allocation)
    captured = capture(
        store,
        checkpoint,
        windows["calibration"],
        windows["selection"],
        CaptureSettings(dtype, settings.retain),
        execution,
    )
    inputs = LaneInputs(checkpoint, captured, windows["calibration"], windows["selection"])
    scores = branch(store, inputs, read_plans(store, allocation), linears, pruning, execution)
    selected = select(store, scores, float(str(captured.facts[DENSE_PERPLEXITY])))
    selection = read_selection(store, selected)
    chosen, uniform = scores[selection.best], scores[0]
    exported = export(store, checkpoint, captured, chosen, uniform, linears, pruning, execution)
    testing = LaneInputs(checkpoint, captured, windows["calibration"], windows["test"])
    tested = evaluate(store, testing, uniform.plan, chosen.plan, linears, pruning, execution)

    stages = {
        "checkpoint": checkpoint.artifact,
        **windows,
        "allocate": allocation,
        "capture": captured,
        **{f"lane beta {score.plan.beta:.12g}": score.artifact for score in scores},
        "select": selected,
        "export": exported,
        "evaluate": tested,
    }
    result = SearchResult(
        settings,
        str(checkpoint.artifact.facts["source"]),
        selection,
        read_test(store, tested),
        store.location(exported),
        stages,
        tuple(role for role, artifact in stages.items() if artifact.key in store.built),
        checkpoint.bytes_read,
    )
    publish_result(store, result)
    return result


@stage_task(name="import_checkpoint")
def load_checkpoint(store: ArtifactStore, settings: Search) -> Checkpoint:
    """Import the model unless the store has it; open it for reading.

    Raises:
        ValueError: a model that cannot be pruned, or betas that its depth does not allow; before anything is
        copied.
    """
    if store.find(import_stage(settings.model)) is None:
        sizes = layer_sizes_of(linears_by_layer(inspect_source(settings.model), settings.seqlen))
        settings.allocation.plans(sizes)
    return import_checkpoint(store, settings.model)


@stage_task(name="sample_tokens")
def sample_windows(
    store: ArtifactStore, checkpoint: Checkpoint, requests: Mapping[Role, TokenRequest]
) -> dict[Role, Artifact]:
    """Token windows for calibration, selection and test; where they share a corpus they never overlap."""
    return {
        role: sample_tokens(store, checkpoint.tokenizer, checkpoint.tokenizer_identity, request)
        for role, request in requests.items()
    }


def token_requests(settings: Search) -> dict[Role, TokenRequest]:
    """Which windows each role needs."""
    names: dict[Role, str] = {
        "calibration": settings.calibration,
        "selection": settings.selection,
        "test": settings.test or settings.selection,
    }
    windows = {
        "calibration": settings.calibration_windows,
        "selection": settings.selection_windows,
        "test": settings.test_windows,
    }
    corpora = {role: open_corpus(name, role) for role, name in names.items()}
    parts = assign_parts(corpora)
    return {
        role: TokenRequest(
            role,
            corpus,
            windows[role],
            settings.seqlen,
            parts[role],
            settings.seed if role == "calibration" else None,
        )
        for role, corpus in corpora.items()
    }


def publish_result(store: ArtifactStore, result: SearchResult) -> None:
    """The result as an artifact of the store, and as a table and a link in Prefect."""
    keys = {role: artifact.key for role, artifact in result.stages.items()}
    document = {
        "settings": result.settings.model_dump(mode="json"),
        "source": result.source,
        "verdict": result.selection.verdict,
        "selection": asdict(result.selection),
        "test": asdict(result.test),
        "stages": keys,
    }
    settings = {"settings": document["settings"], "source": result.source}
    stage = Stage(RESULT_STAGE, 1, settings, {role.replace(" ", "-"): key for role, key in keys.items()})

    def build(draft: Draft) -> None:
        draft.write(RESULT_FILE, json.dumps(document, indent=1).encode())
        draft.facts |= {"verdict": result.selection.verdict, "source": result.source}

    store.get_or_build(stage, build)
    with going_on_without_prefect():
        create_table_artifact(
            key="search-result",
            table=table_rows(result.selection),
            description=f"{result.source} at sparsity {result.settings.sparsity:g}: {result.selection.verdict}",
        )
        create_link_artifact(key="pruned-model", link=result.pruned, description="The exported checkpoint")


def table_rows(selection: Selection) -> list[dict[str, str | float]]:
    """The result table: one row per beta, with the paired difference to the best."""
    rows: list[dict[str, str | float]] = []
    for index, row in enumerate(selection.rows):
        difference = row.above_best
        rows.append(
            {
                "beta": row.beta,
                "loss": round(row.loss, 4),
                "perplexity": "diverged" if row.loss >= DIVERGED else round(row.perplexity, 2),
                "above best": "best" if difference is None else f"{difference.mean:+.4f}",
                "t": "" if difference is None or difference.t is None else f"{difference.t:.1f}",
                "realised sparsity": round(row.realised_sparsity, 5),
                "plan": "uniform" if index == 0 else "ATP",
            }
        )
    return rows
