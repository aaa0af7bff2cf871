"""Select: choose the plan with the lowest loss on the selection windows, and measure how certain the choice is."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from layerwise.scoring.perplexity import mean_loss, paired_difference
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.lane_scores import LaneScore
from layerwise.tasks.results.run_names import plans_title
from layerwise.tasks.results.selection import SELECTION_FILE, ScoreRow, Selection
from layerwise.tasks.running.stage_task import stage_task


def select_stage(scores: Sequence[LaneScore], dense_perplexity: float, parameter: str) -> Stage:
    """Describe the choice among these lanes."""
    lanes = {f"lane {number:03d}": score.artifact.key for number, score in enumerate(scores)}
    points = [[score.plan.beta, score.plan.offset] for score in scores]
    return Stage("select", 2, {"points": points, "dense": dense_perplexity, "parameter": parameter}, lanes)


@stage_task(about=lambda scores, **_: f"among {plans_title([score.plan for score in scores])}")
def select(
    store: ArtifactStore, scores: Sequence[LaneScore], dense_perplexity: float, parameter: str = "beta"
) -> Artifact:
    """Choose the plan with the lowest mean loss; of plans with equal loss, the first, which is the flattest.

    A lane that a race has stopped early is never chosen.
    """

    def build(draft: Draft) -> None:
        selection = compare(scores, dense_perplexity, parameter)
        draft.write(SELECTION_FILE, json.dumps(asdict(selection), indent=1).encode())
        draft.facts |= {"verdict": selection.verdict}

    return store.get_or_build(select_stage(scores, dense_perplexity, parameter), build)


def compare(scores: Sequence[LaneScore], dense_perplexity: float, parameter: str = "beta") -> Selection:
    """Compare every plan with the best one, window by window.

    Only plans that were scored on all windows can be the best or the runner-up.
    """
    windows = max(len(score.losses) for score in scores)
    whole = [index for index, score in enumerate(scores) if len(score.losses) == windows]
    by_loss = sorted(whole, key=lambda index: (mean_loss(scores[index].losses), index))
    best = by_loss[0]
    rows = tuple(_row(score, None if index == best else scores[best]) for index, score in enumerate(scores))
    runner_up = by_loss[1] if len(by_loss) > 1 else None
    return Selection(rows, best, runner_up, dense_perplexity, parameter)


def _row(score: LaneScore, best: LaneScore | None) -> ScoreRow:
    """Compare one lane with the best one; ``best`` is None for the best lane itself."""
    seen, loss = len(score.losses), mean_loss(score.losses)
    above = None if best is None else paired_difference(score.losses, best.losses[:seen])
    if best is not None and above is not None and seen < len(best.losses):
        loss = mean_loss(best.losses) + above.mean
    plan, realised = score.plan, score.realised_sparsity
    return ScoreRow(plan.beta, loss, math.exp(loss), above, realised, seen, plan.offset)
