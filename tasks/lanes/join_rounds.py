"""Join rounds: a lane that ran on one part of the windows after the other, as one lane."""

from collections.abc import Sequence
from functools import partial

import pyarrow as pa

from layerwise.scoring.perplexity import perplexity
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table, write_table
from layerwise.tasks.branch import LAYERS_FILE, LOSSES_FILE, LaneScore, plan_facts, read_score
from layerwise.tasks.results.run_names import plans_title
from layerwise.tasks.running.stage_task import stage_task


def joined_stage(rounds: Sequence[LaneScore]) -> Stage:
    """The stage that joins the rounds of one lane, in the order of their windows."""
    return Stage(
        "lane_rounds",
        1,
        None,
        {f"round {number:03d}": score.artifact.key for number, score in enumerate(rounds)},
    )


@stage_task(about=lambda lanes, **_: plans_title([rounds[0].plan for rounds in lanes]))
def join_rounds(store: ArtifactStore, lanes: Sequence[Sequence[LaneScore]]) -> list[LaneScore]:
    """Every lane as one artifact, which holds what ``branch`` would have left for all of its windows.

    Losses follow each other, errors and energies add up; pruned weights do not depend on the scored windows.
    """
    return [_joined(store, rounds) for rounds in lanes]


def _joined(store: ArtifactStore, rounds: Sequence[LaneScore]) -> LaneScore:
    artifact = store.get_or_build(joined_stage(rounds), partial(_join, store, rounds))
    return read_score(store, rounds[0].plan, artifact)


def _join(store: ArtifactStore, rounds: Sequence[LaneScore], draft: Draft) -> None:
    first = rounds[0]
    for name in first.artifact.files:
        if name not in (LOSSES_FILE, LAYERS_FILE):
            draft.write(name, store.read(first.artifact, name))
    losses = [loss for score in rounds for loss in score.losses]
    write_table(draft, LOSSES_FILE, pa.table({"window": range(len(losses)), "loss": losses}))
    tables = [read_table(store, score.artifact, LAYERS_FILE) for score in rounds]
    sums = {
        name: [sum(parts) for parts in zip(*(table[name].to_pylist() for table in tables), strict=True)]
        for name in ("error", "dense_energy")
    }
    write_table(draft, LAYERS_FILE, pa.table({"layer": tables[0]["layer"], **sums}))
    draft.facts |= plan_facts(first.plan) | {"selection perplexity": perplexity(losses)}
