"""Evaluate: test perplexity of the dense, the uniform and the chosen model, on text that nothing was chosen by."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.models.skeleton import Linear
from layerwise.scoring.perplexity import PairedDifference, paired_difference, perplexity
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.tasks.branch import LOSSES_FILE, write_lane
from layerwise.tasks.lanes.lane_group import GroupResult, LaneInputs, advance_group
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.results.run_names import model_title, plans_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task

TEST_FILE = "test.json"
# On so many test windows each pruned layer also runs on the dense model's input: means over 30 layers and 2048 tokens
# or more a window are sure enough, and a test of the usual 64 windows or more takes a few per cent longer.
LOCAL_WINDOWS = 4


@dataclass(frozen=True)
class TestResult:
    """Perplexity on the test windows.

    Attributes:
        gain: paired difference of the chosen plan's loss to the uniform plan's, in nats; None if they are
        one.
    """

    __test__ = False  # pytest: this is no test class

    windows: int
    dense: float
    uniform: float
    best: float
    gain: PairedDifference | None


def evaluate_stage(
    inputs: LaneInputs, uniform: SparsityPlan, best: SparsityPlan, settings: PruneSettings
) -> Stage:
    """The stage of an evaluation; the dense model is in every one of them."""
    layers = [list(plan.layers) for plan in _distinct(uniform, best)]
    return Stage("evaluate", 2, {"plans": layers, "prune": settings.identity}, inputs.keys(settings))


def _distinct(uniform: SparsityPlan, best: SparsityPlan) -> list[SparsityPlan]:
    return [uniform] if best == uniform else [uniform, best]


@stage_task(
    about=lambda inputs, best, settings, **_: (
        f"{model_title(inputs.checkpoint)} at {settings.target:g}, {plans_title([best])}"
    )
)
def evaluate(
    store: ArtifactStore,
    inputs: LaneInputs,
    uniform: SparsityPlan,
    best: SparsityPlan,
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
) -> Artifact:
    """Score the dense, the uniform and the best model on ``inputs.scored``, the test windows: once."""
    plans = _distinct(uniform, best)

    def build(draft: Draft) -> None:
        title = "evaluate: dense, uniform and best on the test windows"
        removed = [settings.removed(plan, linears) for plan in plans]
        result = advance_group(store, draft, inputs, removed, settings, execution, title, LOCAL_WINDOWS)
        draft.facts |= evaluation_facts(write_evaluation(draft, result, linears, settings))

    return store.get_or_build(evaluate_stage(inputs, uniform, best, settings), build)


def write_evaluation(
    draft: Draft,
    result: GroupResult,
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    folder: str = "",
) -> TestResult:
    """Write the tables of the dense, the uniform and, if it is another plan, the best lane."""
    for lane, name in enumerate(("dense", "uniform", "best")[: len(result.losses)]):
        write_lane(draft, f"{folder}{name}", result, lane, linears, settings)
    dense, plain, chosen = (*result.losses, result.losses[-1])[:3]
    gain = None if len(result.losses) == 2 else paired_difference(chosen, plain)
    test = TestResult(len(dense), perplexity(dense), perplexity(plain), perplexity(chosen), gain)
    draft.write(f"{folder}{TEST_FILE}", json.dumps(asdict(test), indent=1).encode())
    return test


def evaluation_facts(test: TestResult) -> dict[str, float]:
    """What the manifest of an evaluation says."""
    return {"dense": test.dense, "uniform": test.uniform, "best": test.best}


def best_losses(store: ArtifactStore, artifact: Artifact) -> tuple[float, ...]:
    """Losses of the chosen plan, by test window, in nats."""
    lane = "best" if f"best/{LOSSES_FILE}" in artifact.files else "uniform"
    return tuple(read_table(store, artifact, f"{lane}/{LOSSES_FILE}")["loss"].to_pylist())


def read_test(store: ArtifactStore, artifact: Artifact, folder: str = "") -> TestResult:
    """What an artifact of ``evaluate`` holds, or one of several evaluations in their folders."""
    document = json.loads(store.read(artifact, f"{folder}{TEST_FILE}"))
    return TestResult(**{**document, "gain": document["gain"] and PairedDifference(**document["gain"])})
