"""Select: choose the plan that the criterion prefers on the selection windows, and measure how certain the choice is."""

import json
import math
from collections.abc import Sequence

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
    """Choose the plan with the lowest mean of the criterion; of equal plans, the first, which is the flattest.

    The criterion is the divergence from the dense model if the lanes measured it, and else the loss. A lane that a race
    has stopped early is never chosen.
    """

    def build(draft: Draft) -> None:
        selection = compare(scores, dense_perplexity, parameter)
        draft.write(SELECTION_FILE, json.dumps(selection.document, indent=1).encode())
        draft.facts |= {"verdict": selection.verdict}

    return store.get_or_build(select_stage(scores, dense_perplexity, parameter), build)


def compare(scores: Sequence[LaneScore], dense_perplexity: float, parameter: str = "beta") -> Selection:
    """Compare every plan with the best one, window by window.

    Only plans that were scored on all windows can be the best or the runner-up.
    """
    windows = max(len(score.losses) for score in scores)
    whole = [index for index, score in enumerate(scores) if len(score.losses) == windows]
    by_mean = sorted(whole, key=lambda index: (mean_loss(scores[index].compared), index))
    best = by_mean[0]
    rows = tuple(_row(score, None if index == best else scores[best]) for index, score in enumerate(scores))
    runner_up = by_mean[1] if len(by_mean) > 1 else None
    return Selection(rows, best, runner_up, dense_perplexity, parameter)


def _row(score: LaneScore, best: LaneScore | None) -> ScoreRow:
    """Compare one lane with the best one; ``best`` is None for the best lane itself."""
    seen = len(score.losses)
    above = None if best is None else paired_difference(score.compared, best.compared[:seen])
    loss = _mean(score.losses, None if best is None else best.losses)
    kl = None
    if score.divergences is not None:
        kl = _mean(score.divergences, None if best is None else best.divergences)
    plan, realised = score.plan, score.realised_sparsity
    return ScoreRow(plan.beta, loss, math.exp(loss), above, realised, seen, plan.offset, kl)


def _mean(values: Sequence[float], of_best: Sequence[float] | None) -> float:
    """Return the mean over all windows; of a lane that was stopped early, as ``ScoreRow.loss`` says."""
    seen = len(values)
    if of_best is None or seen == len(of_best):
        return mean_loss(values)
    return mean_loss(of_best) + paired_difference(values, of_best[:seen]).mean
