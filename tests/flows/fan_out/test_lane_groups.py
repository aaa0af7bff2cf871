"""Lane groups: as few as keep every worker busy and the hidden states of every group in memory."""

import pytest
from rich.console import Console

from layerwise.flows.cli.tables import show_plan
from layerwise.flows.fan_out.lane_groups import group_count
from layerwise.flows.plan import plan_search
from layerwise.flows.runtime import SearchRuntime
from layerwise.tasks.lanes.group_membership import split_evenly


@pytest.mark.parametrize(
    ("lanes", "workers", "in_memory", "groups"),
    [
        (9, 1, 9, 1),
        (9, 3, 9, 3),
        (9, 3, 2, 6),  # five groups would fit into memory, but leave one worker idle in the second round
        (9, 4, 4, 4),
        (9, 20, 9, 9),
        (9, 2, 1, 9),  # not more groups than betas
        (1, 4, 1, 1),
        (0, 4, 1, 0),
    ],
)
def test_the_number_of_groups_follows_from_betas_workers_and_memory(lanes, workers, in_memory, groups):
    assert group_count(lanes, workers, in_memory) == groups


def test_betas_are_divided_evenly_and_in_order():
    assert split_evenly([0, 1, 2, 3, 4, 5, 6, 7, 8], 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert split_evenly([0, 1, 2, 4, 5], 2) == [[0, 1, 2], [4, 5]]
    assert split_evenly([3, 4], 5) == [[3], [4]]
    assert split_evenly([], 3) == []


def test_a_plan_shows_the_groups_and_counts_one_read_of_the_model_for_each(workshop, tmp_path, capsys):
    def plan(**runtime):
        return plan_search(
            workshop.settings(betas=[0.05, 0.1, 0.15, 0.2]), SearchRuntime(store=str(tmp_path), **runtime)
        )

    window = 16 * 32 * 4  # tokens, width, bytes
    alone, spread = plan(), plan(fan_out="processes:2")
    (branch,) = (stage for stage in alone.stages if stage.name.startswith("branch"))
    (spread_branch,) = (stage for stage in spread.stages if stage.name.startswith("branch"))
    assert (alone.groups, spread.groups) == ((5,), (3, 2))
    assert spread_branch.reads == 2 * branch.reads
    assert alone.memory["hidden states"] == 5 * 4 * window
    assert spread.memory["hidden states"] == 3 * 4 * window
    assert plan(fan_out="processes:2", hidden_states_gib=2 * 4 * window / 2**30).groups == (2, 1, 1, 1)
    assert plan(fan_out="processes:2", groups=5).groups == (1, 1, 1, 1, 1)
    show_plan(Console(width=200), spread)
    assert (
        "fan-out: 2 groups of 3, 2 betas on processes:2, 2 at a time; each group reads the model once"
        in capsys.readouterr().out
    )
