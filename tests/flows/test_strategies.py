"""Search strategies on a real Prefect server: fewer lanes than a grid, the same scores, no repeated work."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from prefect.exceptions import ParameterTypeError
from transformers import AutoModelForCausalLM

from layerwise.flows.compare import Compare, compare
from layerwise.flows.fan_out.part_flows import evaluate
from layerwise.flows.pipeline.lookup import look_up
from layerwise.flows.plan import plan_search
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.theory import Theory, theory
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.roles import lane_role

BETAS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]  # the last one removes the whole third layer
WINDOWS = 24


@pytest.fixture(scope="module")
def settings(workshop, tmp_path_factory):
    """Return a function for settings of a search of a model that has learned to count, so that pruning harms it."""
    folder = tmp_path_factory.mktemp("counting")
    shutil.copytree(workshop.model, folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        input_ids = 1 + (torch.randint(96, (16, 1)) + torch.arange(16)) % 96
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{1 + number % 96}" for number in range(3000)))
    places = {"model": str(folder / "model"), "calibration": str(text), "selection": str(text)}
    common = {"betas": BETAS, "selection_windows": WINDOWS, **places}
    return lambda **changes: workshop.settings(**common | changes)


@pytest.fixture(scope="module")
def grid(settings, prefect_backend, tmp_path_factory):
    runtime = SearchRuntime(store=str(tmp_path_factory.mktemp("grid") / "store"))
    return search(settings(), runtime), runtime


@pytest.fixture(scope="module")
def race(settings, grid):
    return search(settings(strategy="race"), grid[1])


def losses_by_beta(result):
    return {row.beta: row.loss for row in result.selection.rows}


def test_a_race_stops_beaten_plans_and_chooses_the_same_plan_as_the_grid(grid, race):
    rows = {row.beta: row for row in race.selection.rows}
    assert list(rows) == [0.0, *BETAS]
    stopped = [beta for beta, row in rows.items() if row.windows < WINDOWS]
    assert stopped
    assert all(rows[beta].above_best.significant for beta in stopped)
    whole = losses_by_beta(grid[0])
    assert [rows[beta].loss for beta in rows if beta not in stopped] == pytest.approx(
        [whole[beta] for beta in rows if beta not in stopped], rel=1e-5
    )
    assert race.selection.best_row.beta == grid[0].selection.best_row.beta
    assert race.test == grid[0].test


@pytest.mark.parametrize("strategy", ["race", "adaptive"])
def test_a_finished_search_with_a_strategy_is_reused(settings, grid, race, strategy):
    first = search(settings(strategy=strategy), grid[1])
    store = ArtifactStore(grid[1].store)
    assert look_up(store, settings(strategy=strategy)).missing == []
    before = store.fs.find(store.root)
    again = search(settings(strategy=strategy), grid[1])
    assert (again.built, again.bytes_read) == ((), 0)
    assert again.selection == first.selection
    (log,) = set(store.fs.find(store.root)) - set(before)
    assert "/logs/" in log
    assert not [stage for stage in plan_search(settings(strategy=strategy), grid[1]).stages if stage.to_do]


def test_an_adaptive_search_reuses_the_lanes_of_an_earlier_grid(settings, grid):
    result = search(settings(strategy="adaptive", trials=4), grid[1])
    assert not [role for role in result.built if role.startswith("lane")]
    rows, whole = result.selection.rows, losses_by_beta(grid[0])
    assert rows[0].beta == 0.0
    assert len(rows) <= 4
    assert {row.beta: row.loss for row in rows} == {row.beta: whole[row.beta] for row in rows}


def test_a_plan_shows_the_first_round_and_that_more_may_follow(settings, tmp_path):
    plan = plan_search(settings(strategy="race"), SearchRuntime(store=str(tmp_path / "store")))
    (branch,) = [stage for stage in plan.stages if stage.name.startswith("branch")]
    assert branch.state == "prune and score 7 of them, windows 0 to 7; more may follow"


def test_a_race_in_another_process_has_the_result_of_a_race_in_this_one(settings, grid, race, tmp_path):
    runtime = SearchRuntime(store=str(tmp_path / "store"), fan_out="processes:1")
    spread = search(settings(strategy="race"), runtime)
    assert spread.selection == race.selection
    assert {role: artifact.content for role, artifact in spread.stages.items()} == {
        role: artifact.content for role, artifact in race.stages.items()
    }


def test_a_bayesian_search_starts_with_uniform_and_the_betas_and_keeps_its_budget(settings, grid):
    bayesian = search(settings(strategy="bayesian", trials=14, betas=[0.1]), grid[1])
    rows = bayesian.selection.rows
    assert [row.beta for row in rows] == [float(number) for number in range(14)]
    assert bayesian.selection.name(13) == "trial 13"
    whole = losses_by_beta(grid[0])
    assert [row.loss for row in rows[:2]] == [whole[0.0], whole[0.1]]
    assert {row.realised_sparsity for row in rows} == {rows[0].realised_sparsity}
    assert len({row.loss for row in rows}) == 14


@pytest.fixture(scope="module")
def evolutionary(settings, grid):
    """A search of two rounds: its first three plans, and seven made from the losses of these."""
    return search(settings(strategy="evolutionary", trials=10, betas=[0.1, 0.2]), grid[1])


def test_an_evolutionary_search_improves_on_its_first_plans(grid, evolutionary):
    rows = evolutionary.selection.rows
    assert len(rows) == 10
    assert evolutionary.selection.best_row.loss < min(row.loss for row in rows[:3])
    assert look_up(ArtifactStore(grid[1].store), evolutionary.settings).missing == []


@pytest.fixture(scope="module")
def projections(settings, grid):
    return search(settings(strategy="projections", trials=23, betas=[0.1]), grid[1])


def test_a_search_over_projections_shares_its_first_lanes_with_the_grid_and_is_not_worse(
    settings, grid, projections
):
    whole = losses_by_beta(grid[0])
    rows = projections.selection.rows
    assert rows[0].loss == whole[0.0]
    assert rows[1].loss == whole[0.1]
    assert len(rows) == 2 + 14 + 4
    assert projections.selection.best_row.loss < min(rows[0].loss, rows[1].loss)
    page = ArtifactStore(grid[1].store).fs.cat_file(projections.report).decode()
    assert "by atp with the strategy projections" in page
    assert re.search(r"By kind: self_attn.q_proj \d+\.\d %, ", page)
    assert "U shape" not in page
    assert len({row.realised_sparsity for row in rows}) == 1
    assert (
        look_up(
            ArtifactStore(grid[1].store), settings(strategy="projections", trials=23, betas=[0.1])
        ).missing
        == []
    )


def test_a_search_that_makes_plans_is_stopped_and_continued_over_processes_with_the_same_result(
    evolutionary, tmp_path
):
    # The time limit is asked for before each request, whatever the number of processes that share the request.
    spread_out = {"store": str(tmp_path / "store"), "fan_out": "processes:2", "groups": 2}
    stopped = search(evolutionary.settings, SearchRuntime(minutes=1e-6, **spread_out))
    assert stopped.settings == evolutionary.settings.model_copy(update={"stop_after": 3})
    assert losses_by_beta(stopped).items() <= losses_by_beta(evolutionary).items()
    assert len(stopped.selection.rows) == 3
    spread = search(evolutionary.settings, SearchRuntime(**spread_out))
    assert spread.selection == evolutionary.selection
    assert {role: artifact.content for role, artifact in spread.stages.items()} == {
        role: artifact.content for role, artifact in evolutionary.stages.items()
    }


def test_a_search_at_its_time_limit_chooses_among_the_tried_plans_and_can_continue(settings, tmp_path):
    asked = settings(strategy="adaptive", trials=6)
    store = str(tmp_path / "store")
    stopped = search(asked, SearchRuntime(store=store, minutes=1e-6))
    tried = [0.0, BETAS[0], BETAS[2]]  # the first request of an adaptive search
    assert [row.beta for row in stopped.selection.rows] == tried
    assert stopped.settings == asked.model_copy(update={"stop_after": 3})
    assert "The search was stopped after 3 plans; others may be better." in Path(stopped.report).read_text()
    plan = plan_search(stopped.settings, SearchRuntime(store=store))
    assert not [stage for stage in plan.stages if stage.to_do]
    assert search(stopped.settings, SearchRuntime(store=store)).built == ()
    again = search(asked, SearchRuntime(store=store, minutes=60))
    assert again.settings == asked
    assert len(again.selection.rows) > 3
    assert "The search was stopped" not in Path(again.report).read_text()
    assert not [role for role in again.built if role in {lane_role(beta, 0) for beta in tried}]


def test_a_time_limit_that_is_not_reached_changes_nothing(settings, tmp_path):
    asked = settings(strategy="adaptive", trials=6)
    plain, limited = (
        search(asked, SearchRuntime(store=str(tmp_path / name), minutes=minutes))
        for name, minutes in (("plain", None), ("limited", 60))
    )
    assert limited.settings == asked
    assert (limited.selection, limited.bytes_read) == (plain.selection, plain.bytes_read)


def test_a_request_that_has_a_finished_lane_is_completed_after_the_time_limit(settings, tmp_path):
    store, other = (ArtifactStore(str(tmp_path / name)) for name in ("store", "other"))
    asked = settings(strategy="evolutionary", trials=10, betas=[0.1], export=False)
    whole = search(asked, SearchRuntime(store=store.url))
    shutil.copytree(tmp_path / "store", tmp_path / "other")
    begun = whole.stages["lane beta 9"]  # the last of ten lanes: two first plans and a generation of eight
    shutil.rmtree(tmp_path / "other" / begun.key)
    again = search(asked, SearchRuntime(store=other.url, minutes=1e-6))
    assert (again.settings, again.selection) == (asked, whole.selection)


def test_a_plan_of_a_stopped_search_does_not_say_that_more_may_follow(settings, tmp_path):
    runtime = SearchRuntime(store=str(tmp_path / "store"))
    ends = {2: "prune and score 3 of them", 4: "prune and score 3 of them; more may follow"}
    for stop_after, state in ends.items():
        plan = plan_search(settings(strategy="adaptive", stop_after=stop_after), runtime)
        assert [stage.state for stage in plan.stages if stage.name.startswith("branch")] == [state]


def test_a_time_limit_is_refused_for_searches_and_flows_that_cannot_stop_early(settings, tmp_path):
    runtime = SearchRuntime(store=str(tmp_path / "store"), minutes=5)
    for strategy in ("grid", "race"):
        for run in (search, plan_search):
            with pytest.raises(
                ValueError, match=f"^minutes is 5, but the strategy {strategy} scores all plans"
            ):
                run(settings(strategy=strategy), runtime)
    with pytest.raises(
        ParameterTypeError, match="minutes is 5.0, which is not a setting of this flow. Leave minutes out"
    ):
        compare(Compare(search=settings(strategy="adaptive")), runtime)
    with pytest.raises(
        ParameterTypeError, match="minutes is 5.0, which is not a setting of this flow. Leave minutes out"
    ):
        theory(Theory(search=settings(export=False, betas=None)), runtime)
    with pytest.raises(
        ParameterTypeError, match="minutes is 5.0, which is not a setting of this flow. Leave minutes out"
    ):
        evaluate(settings(strategy="adaptive"), runtime)
    with pytest.raises(ValueError, match="stop_after is 3, but the strategy grid tries all plans"):
        settings(strategy="grid", stop_after=3)
    with pytest.raises(
        ValueError, match="stop_after is 3, but the strategy auto and listed betas tries all plans"
    ):
        settings(betas=[0.1, 0.2, 0.3, 0.4], stop_after=3)
    assert not Path(runtime.store).exists()
