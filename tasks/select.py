"""Select: the beta with the lowest loss on the selection windows, and how sure that choice is."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from layerwise.scoring.perplexity import PairedDifference, mean_loss, paired_difference
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.branch import LaneScore
from layerwise.tasks.results.run_names import plans_title
from layerwise.tasks.running.stage_task import stage_task

SELECTION_FILE = "selection.json"


TRIAL = "trial"  # the parameter of plans that a strategy made: their number


@dataclass(frozen=True)
class ScoreRow:
    """One beta's line in the result table.

    Attributes:
        loss: mean over the selection windows, in nats; of a lane that was stopped early what it would be if it stayed
            as far above the best one as on the windows it has seen.
        above_best: paired difference of this beta's loss to the best one's, on the windows that this one has seen; None
            for the best itself.
        windows: on how many windows it was scored.
    """

    beta: float
    loss: float
    perplexity: float
    above_best: PairedDifference | None
    realised_sparsity: float
    windows: int
    offset: float = 0.0


@dataclass(frozen=True)
class Selection:
    """What was chosen among which."""

    rows: tuple[ScoreRow, ...]  # in the order of the plans, uniform (beta 0) first
    best: int
    runner_up: int | None  # None if only one plan was tried
    dense_perplexity: float
    parameter: str = "beta"  # what beta is called, with an allocator whose parameter has another name

    @property
    def best_row(self) -> ScoreRow:
        return self.rows[self.best]

    @property
    def verdict(self) -> str:
        """The choice in one sentence, with its uncertainty."""
        if self.runner_up is None:
            return f"{self.name(self.best)} was the only one tried"
        parts = [self._compared(self.runner_up, "the runner-up, ")]
        if self.best != 0 and self.runner_up != 0:
            parts.append(self._compared(0, "uniform, "))
        return f"{self.name(self.best)}: {'; '.join(parts)}"

    def name(self, number: int) -> str:
        """What a row is called."""
        row = self.rows[number]
        offset = f", offset {row.offset:+g}" if row.offset else ""
        return f"{self.parameter} {row.beta:g}{offset}"

    def _compared(self, other: int, role: str) -> str:
        row = self.rows[other]
        difference = row.above_best
        assert difference is not None, "only the best row has no difference to the best"
        gain = 100 * (1 - math.exp(-difference.mean))
        t = "undefined" if difference.t is None else f"{difference.t:.1f}"
        significance = "significant" if difference.significant else "not significant"
        return f"perplexity {gain:.1f} % below {role}{self.name(other)} (t = {t}: {significance})"


def select_stage(scores: Sequence[LaneScore], dense_perplexity: float, parameter: str) -> Stage:
    """The stage of a choice among these lanes."""
    lanes = {f"lane {number:03d}": score.artifact.key for number, score in enumerate(scores)}
    points = [[score.plan.beta, score.plan.offset] for score in scores]
    return Stage("select", 2, {"points": points, "dense": dense_perplexity, "parameter": parameter}, lanes)


@stage_task(about=lambda scores, **_: f"among {plans_title([score.plan for score in scores])}")
def select(
    store: ArtifactStore, scores: Sequence[LaneScore], dense_perplexity: float, parameter: str = "beta"
) -> Artifact:
    """Choose the plan with the lowest mean loss; of equal ones the flattest.

    Lanes that a race has stopped lose to all that ran to the end.
    """

    def build(draft: Draft) -> None:
        selection = compare(scores, dense_perplexity, parameter)
        draft.write(SELECTION_FILE, json.dumps(asdict(selection), indent=1).encode())
        draft.facts |= {"verdict": selection.verdict}

    return store.get_or_build(select_stage(scores, dense_perplexity, parameter), build)


def compare(scores: Sequence[LaneScore], dense_perplexity: float, parameter: str = "beta") -> Selection:
    """All plans against the best one, window by window; those with the most windows can be the best."""
    windows = max(len(score.losses) for score in scores)
    whole = [index for index, score in enumerate(scores) if len(score.losses) == windows]
    by_loss = sorted(whole, key=lambda index: (mean_loss(scores[index].losses), index))
    best = by_loss[0]
    rows = tuple(_row(score, None if index == best else scores[best]) for index, score in enumerate(scores))
    runner_up = by_loss[1] if len(by_loss) > 1 else None
    return Selection(rows, best, runner_up, dense_perplexity, parameter)


def _row(score: LaneScore, best: LaneScore | None) -> ScoreRow:
    """One lane beside the best one, which is None for itself."""
    seen, loss = len(score.losses), mean_loss(score.losses)
    above = None if best is None else paired_difference(score.losses, best.losses[:seen])
    if best is not None and above is not None and seen < len(best.losses):
        loss = mean_loss(best.losses) + above.mean
    plan, realised = score.plan, score.realised_sparsity
    return ScoreRow(plan.beta, loss, math.exp(loss), above, realised, seen, plan.offset)


def read_selection(store: ArtifactStore, artifact: Artifact) -> Selection:
    """What an artifact of ``select`` holds."""
    document = json.loads(store.read(artifact, SELECTION_FILE))
    rows = tuple(
        ScoreRow(**{**row, "above_best": row["above_best"] and PairedDifference(**row["above_best"])})
        for row in document["rows"]
    )
    return Selection(**{**document, "rows": rows})
