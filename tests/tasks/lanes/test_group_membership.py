"""Group membership: lanes are grouped again after interruptions, and while another process runs the same lanes."""

from dataclasses import replace

import layerwise.tasks.branch as branch_module
from layerwise.storage.artifact import Damaged
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.set_aside import set_aside
from layerwise.tasks.lanes import group_membership

BETAS = (0.0, 0.1, 0.2)


def test_another_process_may_commit_a_lane_while_a_group_is_formed(
    small_run, monkeypatch, dying_at, computed_layers
):
    run = small_run()
    with dying_at("layerwise.tasks.branch._copy_lane", call=1):
        run.branch(*BETAS)
    computed_layers.clear()
    other = replace(run, store=ArtifactStore(run.store.url))
    begun_groups, done = group_membership.begun_groups, []

    def after_the_other(store, stages, missing):
        if store is run.store and not done:
            done.append(other.branch(*BETAS))
        return begun_groups(store, stages, missing)

    monkeypatch.setattr("layerwise.tasks.lanes.group_membership.begun_groups", after_the_other)
    assert run.branch(*BETAS) == done[0]
    assert computed_layers == []


def test_another_process_may_set_a_damaged_lane_aside_while_the_lanes_are_read(small_run, monkeypatch):
    run = small_run()
    lanes = run.branch(*BETAS)
    read_score = branch_module.read_score

    def after_the_other(store, plan, artifact):
        if artifact.key == lanes[0].artifact.key:
            damaged = lanes[1].artifact
            set_aside(ArtifactStore(store.url), Damaged("damaged", damaged.key, damaged.token))
        return read_score(store, plan, artifact)

    monkeypatch.setattr("layerwise.tasks.branch.read_score", after_the_other)
    assert run.branch(*BETAS) == lanes


def test_a_group_is_resumed_although_a_beta_was_added_in_front(small_run, dying_at, computed_layers):
    run = small_run()
    run.branch(0.0)
    with dying_at("layerwise.tasks.lanes.lane_group.read_statistics", call=3):
        run.branch(*BETAS, boundary_layers=1)
    computed_layers.clear()
    run.branch(0.0, 0.05, 0.1, 0.2, boundary_layers=1)
    assert computed_layers == [2, 0, 1, 2]


def test_a_damaged_lane_is_copied_again_from_its_group(small_run, computed_layers):
    run = small_run()
    lanes = run.branch(*BETAS)
    damaged = lanes[1].artifact
    assert set_aside(run.store, Damaged("damaged", damaged.key, damaged.token))
    computed_layers.clear()
    assert run.branch(*BETAS)[1].artifact.content == damaged.content
    assert computed_layers == []
