"""Several searches of one model in one run, on a real Prefect server."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import PrefectHTTPStatusError
from pydantic import ValidationError

from layerwise.flows.compare import Compare, SearchFailed, compare
from layerwise.flows.pipeline.comparison_tables import Compared, markdown_of, rows_of, summary_of
from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import Search
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.pruners.wanda import Wanda
from layerwise.recovery.refit import Refit
from layerwise.scoring.perplexity import PairedDifference
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.evaluation import TestResult

LEAST = {"model": "models/demo", "sparsity": 0.5}


def names_in(store_url):
    """Return the number of artifacts in a store, by kind."""
    names = [artifact.recipe["name"] for artifact in ArtifactStore(store_url).artifacts()]
    return {name: names.count(name) for name in names}


def keys_of(result):
    """Return keys by role, without the export, which a comparison does not have."""
    return {role: artifact.key for role, artifact in result.stages.items() if role != "export"}


def artifacts_of(state, key):
    with get_client(sync_client=True) as client:
        run = ArtifactFilter(flow_run_id={"any_": [state.state_details.flow_run_id]})
        return [artifact for artifact in client.read_artifacts(artifact_filter=run) if artifact.key == key]


@pytest.fixture(scope="module")
def settings(workshop) -> Compare:
    """Two sparsities with two pruners each."""
    return Compare(search=workshop.settings(), sparsities=(0.5, 0.4), pruners=(Magnitude(), Wanda()))


@pytest.fixture(scope="module")
def compared(settings, prefect_backend, tmp_path_factory):
    """A comparison in an empty store: its state, its results and its runtime."""
    runtime = Runtime(store=str(tmp_path_factory.mktemp("compared") / "store"))
    state = compare(settings, runtime, return_state=True)
    return state, [each.result for each in state.result()], runtime


def test_every_sparsity_is_combined_with_every_pruner_and_every_seed():
    settings = Compare(search=LEAST, sparsities=(0.7, 0.5), pruners=("wanda", "magnitude"), seeds=(1, 0))
    got = [(search.sparsity, search.pruner.method, search.seed) for search in settings.searches]
    assert got == [
        (0.7, "wanda", 1),
        (0.7, "wanda", 0),
        (0.7, "magnitude", 1),
        (0.7, "magnitude", 0),
        (0.5, "wanda", 1),
        (0.5, "wanda", 0),
        (0.5, "magnitude", 1),
        (0.5, "magnitude", 0),
    ]


def test_settings_that_are_not_given_are_those_of_the_common_search():
    common = Search(**LEAST, pruner="magnitude", seed=4, seqlen=99, betas=(0.01,))
    without_export = {"export": False}
    assert Compare(search=common).searches == (common.model_copy(update=without_export),)
    recoveries = {"search": LEAST | {"recover_windows": 3}, "recoveries": ["none", "refit"]}
    windows = [search.recover_windows for search in Compare.model_validate(recoveries).searches]
    assert windows == [None, 3]
    (other,) = Compare(search=common, sparsities=(0.7,)).searches
    assert other == common.model_copy(update={"sparsity": 0.7, **without_export})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparsities": [0.5, 1.0]}, "sparsities.1"),
        ({"sparsities": [float("nan")]}, "sparsities.0"),
        ({"sparsities": 0.5}, "sparsities"),
        ({"pruners": ["random"]}, "pruners.0"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"sparsity": 0.5}, "sparsity"),
        ({"search": {**LEAST, "sparsity": 0}}, "search.sparsity"),
        ({"search": {**LEAST, "betas": [0.1], "beta_count": 3}}, "betas and count"),
        ({"sparsities": [0.5, 0.6, 0.50]}, "sparsities has 0.5 more than once"),
        ({"pruners": ["wanda", {"method": "wanda"}]}, "pruners has wanda more than once"),
        ({"seeds": [2, 2]}, "seeds has 2 more than once"),
    ],
)
def test_invalid_searches_are_refused_by_the_name_of_their_field(changes, named):
    with pytest.raises(ValidationError, match=named):
        Compare.model_validate({"search": LEAST} | changes)


def test_an_error_does_not_show_credentials():
    with pytest.raises(ValidationError, match="credentials") as refusal:
        Compare(search={**LEAST, "model": "s3://name:topsecret@bucket/model"}, sparsities=(2,))
    assert "topsecret" not in str(refusal.value)


def test_a_title_names_model_sparsities_and_pruners():
    assert Compare(search=LEAST).title == "demo at 0.5: wanda"
    several = Compare(search=LEAST, sparsities=(0.6, 0.7), pruners=("magnitude", "wanda"), seeds=(0, 1, 2))
    assert several.title == "demo at 0.6, 0.7: magnitude, wanda, 3 seeds"


def test_settings_survive_json():
    settings = Compare(search=LEAST, sparsities=(0.6, 0.7), pruners=("magnitude",))
    assert Compare.model_validate_json(settings.model_dump_json()) == settings


def test_stages_that_the_searches_share_are_built_once(compared):
    _, results, runtime = compared
    assert [(result.settings.sparsity, result.settings.pruner.method) for result in results] == [
        (0.5, "magnitude"),
        (0.5, "wanda"),
        (0.4, "magnitude"),
        (0.4, "wanda"),
    ]
    shared = {"checkpoint", "calibration", "selection", "test", "capture"}
    assert shared < set(results[0].built)
    assert "allocate" not in results[1].built
    assert [shared & set(result.built) for result in results[1:]] == [set(), set(), set()]
    names = names_in(runtime.store)
    assert (names["import_checkpoint"], names["capture"], names["sample_tokens"]) == (1, 1, 3)
    assert (names["allocate"], names["search"], names.get("export", 0)) == (2, 4, 0)


def test_searches_that_differ_in_allocation_share_their_groups_and_tests(
    workshop, prefect_backend, tmp_path, finished
):
    """For three allocators, the uniform lane, its test and the passes of the dense model run once."""
    settings = Compare(search=workshop.settings(), allocators=("atp", "owl", "dlp"))
    runtime = Runtime(store=str(tmp_path / "store"))
    results = [each.result for each in compare(settings, runtime)]
    names = names_in(runtime.store)
    lanes = {
        artifact.key
        for result in results
        for role, artifact in result.stages.items()
        if role.startswith("lane")
    }
    assert (names["lane"], names["lane_group"]) == (len(lanes), 1)
    assert names["evaluate_group"] == 1
    assert keys_of(results[0]) == keys_of(finished[0])
    store = ArtifactStore(runtime.store)
    for role in ("evaluate", "select"):
        assert results[0].stages[role].content == finished[0].stages[role].content
    assert results[1].test.uniform == results[0].test.uniform
    page = Path(results[0].report).read_text()
    for result, allocator in zip(results[1:], ("owl", "dlp"), strict=True):
        assert f"{allocator}, {result.selection.name(result.selection.best)}" in page or (
            result.selection.best == 0 and f"{allocator}, uniform" in page
        )
    assert [each.result.built for each in compare(settings, runtime)] == [(), (), ()]
    assert names_in(store.url) == names


def test_searches_with_and_without_recovery_are_compared(workshop, prefect_backend, tmp_path):
    common = workshop.settings(betas=[0.1], calibration_windows=12, recover_windows=6, recover="refit")
    settings = Compare(search=common, recoveries=("none", "refit"))
    assert [each.search.recover for each in settings.named_searches] == [None, Refit()]
    assert [each.search.recover_windows for each in settings.named_searches] == [None, 6]
    store = tmp_path / "store"
    results = compare(settings, Runtime(store=str(store)))
    assert [row["recover"] for row in rows_of(results)] == ["none", "refit"]
    assert [row["recover"] for row in summary_of(results)] == ["none", "refit"]
    found = names_in(str(store))
    assert found["capture"] == 1
    assert found["recovered"] in (1, 2)  # uniform and best, which may be the same plan
    one_shot, recovered = (each.result for each in results)
    assert recovered.recovery.dense.test == one_shot.test.dense
    if recovered.selection.best == one_shot.selection.best:
        assert recovered.recovery.best_before.test == one_shot.test.best


def test_a_second_run_builds_nothing_and_has_the_same_results(compared, settings):
    _, results, runtime = compared
    before = names_in(runtime.store)
    again = [each.result for each in compare(settings, runtime)]
    assert [result.built for result in again] == [()] * 4
    assert [result.bytes_read for result in again] == [0] * 4
    assert [(result.selection, result.test) for result in again] == [
        (result.selection, result.test) for result in results
    ]
    assert names_in(runtime.store) == before


def test_each_result_is_that_of_a_search_on_its_own(compared, finished):
    _, results, _ = compared
    alone, _ = finished
    assert keys_of(results[1]) == keys_of(alone)
    assert (results[1].selection, results[1].test) == (alone.selection, alone.test)


def test_prefect_has_one_table_of_all_searches_and_a_run_name_with_their_settings(compared, workshop):
    state, results, _ = compared
    (table,) = artifacts_of(state, "compare-result")
    assert table.type == "table"
    assert json.loads(table.data) == rows_of(state.result())
    (summary,) = artifacts_of(state, "compare-summary")
    assert markdown_of(summary_of(state.result())) in summary.data
    assert table.description.startswith(f"{workshop.model}. Perplexities.")
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
    assert run.name == "model at 0.5, 0.4: magnitude, wanda"


def test_the_table_can_be_checked_by_hand(compared):
    state, results, _ = compared
    rows = rows_of(state.result())
    for row, result in zip(rows, results, strict=True):
        by_beta = {score.beta: score.loss for score in result.selection.rows}
        best = min(by_beta, key=by_beta.get)
        assert (row["sparsity"], row["pruner"]) == (
            result.settings.sparsity,
            result.settings.pruner.method,
        )
        assert (row["seed"], row["best"], row["allocator"], row["trials"]) == (0, f"{best:g}", "atp", 3)
        assert row["selection: uniform"] == pytest.approx(math.exp(by_beta[0]), abs=0.006)
        assert row["selection: best"] == pytest.approx(math.exp(by_beta[best]), abs=0.006)
    assert len({row["selection: dense"] for row in rows}) == 1


def test_every_allocator_is_combined_with_every_pruner_and_keeps_its_own_settings():
    settings = Compare(
        search=Search(**LEAST, betas=(0.01,)),
        allocators=("atp", "owl", "atp+offset", "atp+projections", {"allocator": "erf", "betas": [0.1]}),
        pruners=("wanda", "sparsegpt"),
    )
    named = [(search.pruner.method, name) for search, name in settings.named_searches]
    names = ["atp", "owl", "atp+offset", "atp+projections", "erf"]
    assert named == [(pruner, name) for pruner in ("wanda", "sparsegpt") for name in names]
    atp, owl, offset, projections, erf = settings.searches[:5]
    assert (atp.betas, owl.betas, offset.betas, erf.betas) == ((0.01,), None, (0.01,), (0.1,))
    assert (offset.strategy, offset.offsets) == ("two-parameter", (-0.1, -0.05, 0.05, 0.1))
    assert (projections.strategy, projections.betas) == ("projections", (0.01,))
    assert settings.title == "demo at 0.5: wanda, sparsegpt, 5 allocators"


def test_an_allocation_with_another_strategy_does_not_inherit_the_common_trials():
    common = Search(**LEAST, strategy="adaptive", trials=4, stop_after=3)
    atp, projections, given = Compare(
        search=common, allocators=("atp", "atp+projections", {"strategy": "projections", "trials": 30})
    ).searches
    assert (atp.trials, projections.trials, given.trials) == (4, None, 30)
    assert (atp.stop_after, projections.stop_after, given.stop_after) == (3, None, None)
    (owl,) = Compare(search=common, allocators=("owl",)).searches
    assert (owl.strategy, owl.trials, owl.stop_after) == ("auto", None, None)


def with_test(result, allocator="atp", losses=(2.0, 3.0), seed=0, **test):
    """Return a compared search with other test figures."""
    settings = result.settings.model_copy(update={"seed": seed})
    changes = {"test": TestResult(windows=12, dense=10.0, **test), "settings": settings}
    return Compared(type(result)(**vars(result) | changes), allocator, losses, 1.0)


def test_gain_is_in_percent_of_uniform_and_a_diverged_perplexity_is_named(finished):
    result, _ = finished
    better = with_test(result, uniform=50.0, best=40.0, gain=PairedDifference(-0.223, -8.24, 12))
    same = with_test(result, uniform=50.0, best=50.0, gain=None)
    diverged = with_test(result, uniform=math.exp(700), best=40.0, gain=PairedDifference(-696, None, 1))
    columns = ("test: uniform", "test: best", "times dense", "gain %", "t")
    assert [tuple(row[name] for name in columns) for row in rows_of([better, same, diverged])] == [
        (50.0, 40.0, 4.0, 20.0, "-8.2"),
        (50.0, 50.0, 5.0, 0.0, ""),
        ("diverged", 40.0, 4.0, 100.0, ""),
    ]


def test_other_allocators_are_compared_with_the_first_one_window_by_window(finished):
    figures = {"uniform": 50.0, "best": 40.0, "gain": None}
    first = with_test(finished[0], "atp", (2.0, 3.0, 4.0), **figures)
    # The differences are 0.1, 0.2 and 0.3: their mean is 0.2, its standard error 0.1 / sqrt(3).
    other = with_test(finished[0], "owl", (2.1, 3.2, 4.3), **figures)
    row = rows_of([first, other])[1]
    assert (row["above atp %"], row["t of that"], row["significant"]) == (22.1, "3.5", "no")
    assert "above atp %" not in rows_of([first, other])[0]


def test_one_pruner_with_different_settings_is_compared_with_itself_only(finished):
    """Both have the same method, so its name alone would mix them."""
    searches = []
    for pruner, losses in ((SparseGPT(), (2.0, 3.0)), (SparseGPT(block_size=32), (4.0, 5.0))):
        for allocator, above in (("atp", (0.0, 0.0)), ("owl", (0.1, 0.1))):
            of_windows = tuple(loss + more for loss, more in zip(losses, above, strict=True))
            each = with_test(finished[0], allocator, of_windows, uniform=50.0, best=40.0, gain=None)
            settings = each.result.settings.model_copy(update={"pruner": pruner})
            searches.append(replace(each, result=replace(each.result, settings=settings)))
    assert [(row["pruner"], row.get("above atp %")) for row in rows_of(searches)] == [
        ("sparsegpt", None),
        ("sparsegpt", 10.5),
        ("sparsegpt (block_size 32)", None),
        ("sparsegpt (block_size 32)", 10.5),
    ]


def test_the_summary_averages_each_window_over_the_seeds(finished):
    each = [
        with_test(finished[0], name, losses, seed, uniform=50.0, best=best, gain=None)
        for seed, best in ((0, 20.0), (1, 40.0))
        for name, losses in (("atp", (2.0, 3.0)), ("owl", (2.1 + seed / 5, 3.1)))
    ]
    atp, owl = summary_of(each)
    assert (atp["seeds"], atp["test"], atp["spread"]) == (2, 28.28, 49.0)  # sqrt(20 x 40); ln 2 / sqrt 2
    assert atp["gain %"] == 43.4  # 1 - 28.28 / 50
    # Averaged over the seeds, owl is above atp by 0.2 on the first window and by 0.1 on the second.
    assert (owl["above atp %"], owl["t of that"]) == (16.2, "3.0")


def test_a_table_has_empty_cells_for_columns_that_a_row_lacks():
    assert markdown_of([{"a": 1}, {"a": 2, "b": "x"}]).splitlines() == [
        "| a | b |",
        "|--:|--:|",
        "| 1 |  |",
        "| 2 | x |",
    ]


def test_a_failing_search_stops_the_run_with_its_reason_and_earlier_results_stay(
    finished, workshop, tmp_path
):
    """Beta 0.25 is legal at sparsity 0.5, but not at 0.2."""
    runtime = Runtime(store=str(tmp_path / "store"))
    settings = Compare(search=workshop.settings(), sparsities=(0.5, 0.2, 0.6))
    state = compare(settings, runtime, return_state=True)
    assert state.is_failed()
    assert (
        "SearchFailed: search 2 of 3: sparsity 0.2, wanda, seed 0, atp: beta 0.25 is outside" in state.message
    )
    with pytest.raises(SearchFailed) as failure:
        state.result()
    assert isinstance(failure.value.__cause__, ValueError)
    assert artifacts_of(state, "compare-result") == []
    assert names_in(runtime.store)["search"] == 1
    (first,) = compare(Compare(search=workshop.settings()), runtime)
    assert first.result.built == ()
    assert keys_of(first.result) == keys_of(finished[0])


def test_the_form_describes_each_setting_and_a_deployment_validates_its_parameters(prefect_backend, workshop):
    deployment = compare.to_deployment("test", entrypoint_type=EntrypointType.MODULE_PATH).apply()
    settings = {"search": workshop.parameters(), "sparsities": [0.5, 1.5]}
    parameters = {"settings": settings, "runtime": {"store": "memory://unused"}}
    with get_client(sync_client=True) as client:
        schema = client.read_deployment(deployment).parameter_openapi_schema
        fields = schema["definitions"]["Compare"]["properties"]
        lists = {"sparsities", "pruners", "recoveries", "allocators", "seeds"}
        assert set(fields) == {"search", *lists, "preset", "table", "tasks", "way"}
        assert all(field["description"].endswith(".") for field in fields.values())
        assert schema["definitions"]["Compare"]["required"] == ["search"]
        with pytest.raises(PrefectHTTPStatusError, match=r"409[^$]*sparsities"):
            client.create_flow_run_from_deployment(deployment, parameters=parameters)
