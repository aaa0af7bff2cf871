"""Evaluate: test perplexity of the dense, the uniform and the chosen model, on text that nothing was chosen by."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from layerwise.allocation import SparsityPlan
from layerwise.perplexity import PairedDifference, paired_difference, perplexity
from layerwise.skeleton import Linear
from storage.artifact import Artifact
from storage.draft import Draft
from storage.stage import Stage
from storage.store import ArtifactStore
from storage.tables import read_table
from tasks.branch import LOSSES_FILE, write_lane
from tasks.execution import Execution
from tasks.lane_group import LaneInputs, advance_group
from tasks.prune_settings import PruneSettings
from tasks.run_names import model_title, plans_title
from tasks.stage_task import stage_task

TEST_FILE = "test.json"


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
    return Stage("evaluate", 1, {"plans": layers, "prune": settings.identity}, inputs.keys(settings))


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
        result = advance_group(store, draft, inputs, plans, linears, settings, execution, title)
        for lane, name in enumerate(("dense", "uniform", "best")[: len(plans) + 1]):
            write_lane(draft, name, result, lane, linears, settings)
        dense, plain, chosen = (*result.losses, result.losses[-1])[:3]
        gain = None if best == uniform else paired_difference(chosen, plain)
        test = TestResult(len(dense), perplexity(dense), perplexity(plain), perplexity(chosen), gain)
        draft.write(TEST_FILE, json.dumps(asdict(test), indent=1).encode())
        draft.facts |= {"dense": test.dense, "uniform": test.uniform, "best": test.best}

    return store.get_or_build(evaluate_stage(inputs, uniform, best, settings), build)


def best_losses(store: ArtifactStore, artifact: Artifact) -> tuple[float, ...]:
    """Losses of the chosen plan, by test window, in nats."""
    lane = "best" if f"best/{LOSSES_FILE}" in artifact.files else "uniform"
    return tuple(read_table(store, artifact, f"{lane}/{LOSSES_FILE}")["loss"].to_pylist())


def read_test(store: ArtifactStore, artifact: Artifact) -> TestResult:
    """What an artifact of ``evaluate`` holds."""
    document = json.loads(store.read(artifact, TEST_FILE))
    return TestResult(**{**document, "gain": document["gain"] and PairedDifference(**document["gain"])})
