"""Branch: every lane runs once, in any group, in one or several rounds, and despite interruptions."""

from dataclasses import replace

import pytest

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.pruners.magnitude import Magnitude
from layerwise.storage.tables import read_table
from layerwise.tasks.branch import branch, join_rounds, lane_stage
from layerwise.tasks.capture import capture_dense_states
from layerwise.tasks.lanes.group_membership import begun_groups
from layerwise.tasks.running.execution import Execution

MODES = pytest.mark.parametrize("mode", ["dense", "sequential"])

# Called once for every layer (dense), once for every layer and lane (sequential).
READS_STATISTICS = "layerwise.tasks.lanes.lane_group.read_statistics"
WRITES_STATISTICS = "layerwise.tasks.lanes.lane_group.write_statistics"


def zeros_of(run, lane):
    """Return the number of zeros by layer and linear."""
    rows = read_table(run.store, lane.artifact, "linears.parquet").to_pylist()
    return {(row["layer"], row["linear"]): row["zeros"] for row in rows}


@MODES
def test_every_lane_has_a_loss_per_window_and_zeros_per_linear(small_run, mode):
    run = small_run(calibration_mode=mode)
    for lane in run.branch(0.0, 0.2):
        assert len(lane.losses) == 3
        linears = read_table(run.store, lane.artifact, "linears.parquet").to_pylist()
        names = [(index, linear.name) for index, layer in enumerate(run.linears) for linear in layer]
        assert [(row["layer"], row["linear"]) for row in linears] == names
        assert [row["weights"] for row in linears] == [
            linear.numel for layer in run.linears for linear in layer
        ]


@MODES
@pytest.mark.parametrize("pruner", [None, Magnitude()])
@pytest.mark.parametrize("target", [0.5, 0.617])
def test_the_number_of_zeros_matches_the_target_for_every_beta(small_run, mode, pruner, target):
    run = small_run(calibration_mode=mode, target=target, **({"pruner": pruner} if pruner else {}))
    weights = sum(linear.numel for layer in run.linears for linear in layer)
    for lane in run.branch(0.0, 0.1, 0.3):
        assert sum(zeros_of(run, lane).values()) == round(target * weights)
        assert lane.realised_sparsity == round(target * weights) / weights


def test_sparsity_rises_with_depth_by_beta(small_run):
    run = small_run()
    uniform, steep = run.branch(0.0, 0.25)
    for lane, expected in ((uniform, [0.5, 0.5, 0.5]), (steep, [0.25, 0.5, 0.75])):
        zeros = zeros_of(run, lane)
        for layer, linears in enumerate(run.linears):
            removed = sum(zeros[layer, linear.name] for linear in linears)
            assert removed / sum(linear.numel for linear in linears) == pytest.approx(
                expected[layer], abs=1e-3
            )


@MODES
def test_reconstruction_errors_grow_with_depth_and_with_sparsity(small_run, mode):
    light, heavy = (small_run(calibration_mode=mode, target=target).errors() for target in (0.2, 0.7))
    for errors in (light, heavy):
        assert 0 < errors[0] < errors[1] < errors[2]
    assert all(low < high for low, high in zip(light, heavy, strict=True))


def test_a_lane_that_removes_nothing_is_the_dense_model(small_run):
    run = small_run(target=0.0)
    (lane,) = run.branch(0.0)
    dense = read_table(run.store, run.capture(), "losses.parquet")["loss"].to_pylist()
    assert run.errors() == [0.0, 0.0, 0.0]
    assert list(lane.losses) == pytest.approx(dense, rel=1e-6)


@MODES
def test_lanes_in_the_store_are_not_run_again(small_run, computed_layers, mode):
    run = small_run(calibration_mode=mode)
    first = run.branch(0.0, 0.1)
    computed_layers.clear()
    read = run.checkpoint.bytes_read
    assert run.branch(0.0, 0.1) == first
    assert computed_layers == []
    assert run.checkpoint.bytes_read == read


@MODES
def test_adding_a_beta_runs_only_that_one(small_run, mode):
    run = small_run(calibration_mode=mode)
    before = run.branch(0.0, 0.1)
    run.store.built.clear()
    after = run.branch(0.0, 0.05, 0.1)
    assert [after[0], after[2]] == before
    assert {key for key in run.store.built if key.startswith("lane/")} == {after[1].artifact.key}
    (group,) = (run.store.get(key) for key in run.store.built if key.startswith("lane_group/"))
    assert {name.split("/")[0] for name in group.files} == {"lane-000"}


@MODES
def test_a_lane_does_not_depend_on_its_group(small_run, another_store, mode):
    together = small_run(calibration_mode=mode)
    lanes = together.branch(0.0, 0.1, 0.3)
    backwards = small_run(together.folder, another_store(), calibration_mode=mode).branch(0.3, 0.1, 0.0)
    for lane, other in zip(lanes, reversed(backwards), strict=True):
        alone = small_run(together.folder, another_store(), calibration_mode=mode)
        (single,) = alone.branch(lane.plan.beta)
        assert lane.artifact.content == single.artifact.content == other.artifact.content
        assert lane.artifact.key == single.artifact.key == other.artifact.key


@pytest.mark.parametrize("finished_layers", [1, 2])
def test_interrupted_lanes_resume_from_their_last_boundary(
    store, small_run, another_store, dying_at, computed_layers, finished_layers
):
    run = small_run(store=store)
    run.capture()
    computed_layers.clear()
    with dying_at(READS_STATISTICS, call=finished_layers + 1):
        run.branch(0.0, 0.2, boundary_layers=1)
    assert computed_layers == list(range(finished_layers + 1))
    computed_layers.clear()
    resumed = run.branch(0.0, 0.2, boundary_layers=1)
    assert computed_layers == list(range(finished_layers, 3))
    undisturbed = small_run(run.folder, another_store()).branch(0.0, 0.2)
    assert [lane.artifact.content for lane in resumed] == [lane.artifact.content for lane in undisturbed]
    assert resumed[1].losses == undisturbed[1].losses


def test_interrupted_lanes_keep_their_divergences_and_rounds_join_to_those_on_all_windows(
    small_run, dying_at
):
    run = small_run()
    windows = run.checkpoint, run.windows["selection"], run.pruning.dtype, Execution()
    dense = capture_dense_states.fn(run.store, *windows)
    inputs, plans = replace(run.inputs(), criterion="kl", dense_states=dense), run.plans((0.0, 0.2))
    rest = run.linears, run.pruning, Execution(boundary_layers=1)
    with dying_at("layerwise.tasks.lanes.lane_group.losses_and_divergences", call=2):
        branch.fn(run.store, inputs, plans, *rest)
    whole = branch.fn(run.store, inputs, plans, *rest)
    rounds = [branch.fn(run.store, replace(inputs, windows=part), plans, *rest) for part in ((0, 1), (1, 3))]
    joined = join_rounds.fn(run.store, list(zip(*rounds, strict=True)))
    assert [len(lane.divergences) for lane in whole] == [3, 3]
    for lane, other in zip(whole, joined, strict=True):
        assert other.divergences == pytest.approx(lane.divergences, rel=1e-5)
        assert min(lane.divergences) > 0
    dense_losses = run.branch(0.0, 0.2)
    assert [lane.losses for lane in whole] == [lane.losses for lane in dense_losses]
    assert {lane.artifact.key for lane in whole}.isdisjoint(lane.artifact.key for lane in dense_losses)


def test_interrupted_sequential_lanes_resume_from_their_last_boundary(
    small_run, another_store, dying_at, computed_layers
):
    run = small_run(calibration_mode="sequential")
    run.capture()
    computed_layers.clear()
    with dying_at(WRITES_STATISTICS, call=4):  # of the second lane, in the second layer
        run.branch(0.0, 0.2, boundary_layers=1)
    computed_layers.clear()
    resumed = run.branch(0.0, 0.2, boundary_layers=1)
    assert computed_layers == [1, 2]
    undisturbed = small_run(run.folder, another_store(), calibration_mode="sequential").branch(0.0, 0.2)
    assert [lane.artifact.content for lane in resumed] == [lane.artifact.content for lane in undisturbed]


def test_lanes_of_a_finished_group_are_not_computed_again(small_run, dying_at, computed_layers):
    run = small_run()
    run.capture()
    with dying_at("layerwise.tasks.branch.perplexity", call=2):  # during the commit of the second lane
        run.branch(0.0, 0.1, 0.3)
    computed_layers.clear()
    lanes = run.branch(0.0, 0.1, 0.3)
    assert computed_layers == []
    assert [lane.plan.beta for lane in lanes] == [0.0, 0.1, 0.3]
    assert len({lane.artifact.content for lane in lanes}) == 3


def test_weights_are_read_once_for_any_number_of_lanes(small_run, another_store):
    few = small_run()
    many = small_run(few.folder, another_store())
    weights = sum(few.checkpoint.index.layer_bytes) + few.checkpoint.index.outer_bytes
    for run, betas in ((few, [0.0]), (many, [0.0, 0.1, 0.2, 0.3, 0.4])):
        run.capture()
        before = run.checkpoint.bytes_read
        run.branch(*betas)
        assert run.checkpoint.bytes_read - before == weights
        (group,) = (run.store.get(key) for key in run.store.built if key.startswith("lane_group/"))
        assert group.facts["weights read, bytes"] == weights


def test_hidden_states_on_disk_give_the_same_lanes(small_run, another_store, tmp_path):
    run = small_run()
    on_disk = small_run(run.folder, another_store())
    spilled = on_disk.branch(0.0, 0.3, hidden_states_bytes=0, scratch=tmp_path)
    assert [s.artifact.content for s in spilled] == [lane.artifact.content for lane in run.branch(0.0, 0.3)]


@MODES
def test_settings_that_change_a_lane_change_its_key(small_run, mode):
    base = small_run(calibration_mode=mode)
    variants = [
        base,
        small_run(base.folder, calibration_mode=mode, target=0.4),
        small_run(base.folder, calibration_mode=mode, pruner=Magnitude()),
        small_run(base.folder, calibration_mode=mode, dtype="bfloat16"),
        small_run(base.folder, calibration_mode="sequential" if mode == "dense" else "dense"),
    ]
    assert len({run.branch(0.1)[0].artifact.key for run in variants}) == len(variants)


def test_the_key_of_a_lane_depends_on_its_sparsities_only(small_run):
    run = small_run()
    inputs = run.inputs()
    rising, falling = SparsityPlan(0.1, (0.4, 0.5, 0.6)), SparsityPlan(0.1, (0.6, 0.5, 0.4))
    renamed = SparsityPlan(0.2, rising.layers)
    keys = [lane_stage(plan, inputs, run.pruning).key for plan in (rising, falling, renamed)]
    assert keys[0] == keys[2]
    assert keys[0] != keys[1]


def test_the_execution_of_a_lane_is_not_part_of_its_key(small_run):
    run = small_run()
    (lane,) = run.branch(0.1)
    (again,) = run.branch(0.1, hidden_states_bytes=0, boundary_layers=1)
    assert again.artifact == lane.artifact


def test_a_sequential_lane_stores_its_own_statistics(small_run):
    sequential = small_run(calibration_mode="sequential")
    (lane,) = sequential.branch(0.1)
    assert sum(name.startswith("statistics/") for name in lane.artifact.files) == 3
    dense = small_run(sequential.folder)
    assert not [name for name in dense.branch(0.1)[0].artifact.files if name.startswith("statistics/")]


def test_without_plans_there_are_no_lanes(small_run):
    run = small_run()
    assert branch.fn(run.store, run.inputs(), [], run.linears, run.pruning, Execution()) == []


def committed_lanes(run):
    return {artifact.key for artifact in run.store.artifacts() if artifact.recipe["name"] == "lane"}


def test_an_interruption_during_the_commits_repeats_no_layer(small_run, dying_at, computed_layers):
    run = small_run()
    run.branch(0.0)
    computed_layers.clear()
    with dying_at("layerwise.tasks.branch._copy_lane", call=2):
        run.branch(0.0, 0.1, 0.2)
    assert computed_layers == [0, 1, 2]
    assert len(committed_lanes(run)) == 2
    run.branch(0.0, 0.1, 0.2)
    assert computed_layers == [0, 1, 2]
    assert len(committed_lanes(run)) == 3


def test_a_beta_added_after_an_interruption_keeps_the_progress_of_the_others(
    small_run, dying_at, computed_layers
):
    run = small_run()
    run.capture()
    computed_layers.clear()
    with dying_at(READS_STATISTICS, call=3):
        run.branch(0.0, 0.2, boundary_layers=1)
    computed_layers.clear()
    run.branch(0.0, 0.1, 0.2, boundary_layers=1)
    assert computed_layers == [2, 0, 1, 2]  # the first two betas resume, then the new one runs


def test_lanes_without_a_resume_point_run_together_with_added_lanes(small_run, dying_at, computed_layers):
    run = small_run()
    run.capture()
    computed_layers.clear()
    with dying_at(READS_STATISTICS, call=1):
        run.branch(0.0, 0.2)
    computed_layers.clear()
    run.branch(0.0, 0.1, 0.2)
    assert computed_layers == [0, 1, 2]


def test_an_interruption_between_the_losses_of_two_lanes_repeats_no_layer(
    small_run, another_store, dying_at, computed_layers
):
    run = small_run()
    run.capture()
    computed_layers.clear()
    with dying_at("layerwise.tasks.lanes.lane_group.window_losses", call=2):
        run.branch(0.0, 0.2, boundary_layers=1)
    assert computed_layers == [0, 1, 2]
    resumed = run.branch(0.0, 0.2, boundary_layers=1)
    assert computed_layers == [0, 1, 2]
    undisturbed = small_run(run.folder, another_store()).branch(0.0, 0.2)
    assert [lane.artifact.content for lane in resumed] == [lane.artifact.content for lane in undisturbed]


def test_groups_that_were_started_separately_resume_separately(small_run, dying_at, computed_layers):
    run = small_run()
    for betas in ((0.0, 0.1), (0.2, 0.25)):
        with dying_at(READS_STATISTICS, call=2):
            run.branch(*betas, boundary_layers=1)
    plans = run.plans((0.0, 0.1, 0.15, 0.2, 0.25))
    stages = [lane_stage(plan, run.inputs(), run.pruning) for plan in plans]
    assert list(begun_groups(run.store, stages, range(5))) == [[0, 1], [3, 4]]
    computed_layers.clear()
    run.branch(0.0, 0.1, 0.15, 0.2, 0.25)
    assert computed_layers == [1, 2, 1, 2, 0, 1, 2]


def in_rounds(run, beta, *parts):
    """Run the lane of ``beta`` on each part of the windows."""
    inputs = [replace(run.inputs(), windows=part) for part in parts]
    plans = run.plans([beta])
    return [branch.fn(run.store, each, plans, run.linears, run.pruning, Execution())[0] for each in inputs]


@MODES
def test_joined_rounds_have_the_losses_errors_and_zeros_of_one_round(small_run, mode):
    run = small_run(calibration_mode=mode)
    (whole,) = run.branch(0.2)
    rounds = in_rounds(run, 0.2, (0, 2), (2, 3))
    assert [len(part.losses) for part in rounds] == [2, 1]
    (joined,) = join_rounds.fn(run.store, [rounds])
    assert joined.losses == pytest.approx(whole.losses, rel=1e-6)
    assert joined.realised_sparsity == whole.realised_sparsity
    assert set(joined.artifact.files) == set(whole.artifact.files)
    for name in whole.artifact.files:
        expected, table = (read_table(run.store, lane.artifact, name) for lane in (whole, joined))
        assert table.schema == expected.schema
        for column in table.column_names:
            values, wanted = table[column].to_pylist(), expected[column].to_pylist()
            assert values == (wanted if column == "linear" else pytest.approx(wanted, rel=1e-5))


def test_lanes_are_joined_once(small_run):
    run = small_run()
    rounds = in_rounds(run, 0.2, (0, 1), (1, 3))
    (joined,) = join_rounds.fn(run.store, [rounds])
    before = run.files()
    assert join_rounds.fn(run.store, [rounds]) == [joined]
    assert run.files() == before


def test_a_joined_lane_can_be_exported(small_run):
    run = small_run(calibration_mode="sequential")
    (whole,) = run.branch(0.2)
    (joined,) = join_rounds.fn(run.store, [in_rounds(run, 0.2, (0, 2), (2, 3))])
    assert run.losses(run.exported_model(joined), "selection") == pytest.approx(whole.losses, rel=1e-5)
