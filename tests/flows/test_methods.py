"""Whole searches with every pruner and allocator: planned, run, reused, exported."""

import json

import pytest

from layerwise.flows.pipeline.lookup import look_up
from layerwise.flows.plan import plan_search
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.tasks.results.lane_scores import LINEARS_FILE
from layerwise.tasks.results.search_result import RESULT_FILE

METHODS = {
    "sparsegpt": {"pruner": "sparsegpt"},
    "alps": {"pruner": "alps"},
    "wanda_swaps": {"pruner": "wanda_swaps"},
    "owl": {"allocator": "owl", "betas": None},
    "owl by linear": {"allocator": "owl", "betas": None, "granularity": "linear"},
    "lsa, sparsegpt": {"allocator": "lsa", "betas": [0.1, 0.2], "pruner": "sparsegpt"},
    "alpha_pruning": {"allocator": "alpha_pruning", "betas": None},
    "dsa": {"allocator": "dsa", "betas": None},
    "dlp": {"allocator": {"method": "dlp", "statistic": "mean"}, "betas": None},
    "global, dsnot": {"allocator": "global", "betas": None, "granularity": "linear", "pruner": "dsnot"},
    "er_plus": {"allocator": "er_plus", "betas": None, "granularity": "linear"},
    "erf": {"allocator": "erf", "betas": [0.1, 0.3]},
    "given": {"allocator": {"method": "given", "layers": [0.45, 0.5, 0.55]}, "betas": None},
    "offsets": {"offsets": [-0.1, 0.1], "strategy": "two-parameter", "trials": 7},
    "projections": {"strategy": "projections", "trials": 23, "betas": [0.1, 0.2]},
    "projections, owl": {
        "strategy": "projections",
        "trials": 21,
        "allocator": "owl",
        "betas": None,
        "pruner": "magnitude",
    },
    "N:8": {"pattern": "N:8", "betas": [0.1]},
    "2:4": {"pattern": "2:4", "betas": None, "pruner": "magnitude"},
    "without the last down_proj": {"exclude": "2.mlp.down_proj"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_search_with_any_method_is_planned_run_and_reused(run_search, workshop, finished, method):
    changes = METHODS[method]
    settings, runtime = workshop.settings(**changes), finished[1]
    store = ArtifactStore(runtime.store)
    before = plan_search(settings, runtime)
    assert [stage.name for stage in before.stages if stage.to_do][-3:] == ["select", "export", "evaluate"]
    result = run_search(**changes)
    assert not {"checkpoint", "capture", "calibration"} & set(result.built)  # shared by all methods
    assert look_up(store, settings).missing == []
    assert not [stage for stage in plan_search(settings, runtime).stages if stage.to_do]
    assert run_search(**changes).built == ()

    uniform = result.selection.rows[0]
    assert (uniform.beta, uniform.offset) == (0.0, 0.0)
    assert {round(row.realised_sparsity, 4) for row in result.selection.rows} == {0.5}
    report = json.loads(store.read(result.stages["export"], "sparsity.json"))
    assert report["realised"] == pytest.approx(0.5, abs=1e-4)
    document = json.loads(store.read(store.get(_result_key(store, result)), RESULT_FILE))
    assert document["verdict"] == result.selection.verdict


def _result_key(store: ArtifactStore, result) -> str:
    keys = {artifact.key for artifact in result.stages.values()}
    (found,) = [
        artifact.key
        for artifact in store.artifacts()
        if artifact.recipe["name"] == "search" and set(artifact.recipe["inputs"].values()) == keys
    ]
    return found


def test_given_sparsities_are_those_of_the_lane(run_search, finished):
    result = run_search(**METHODS["given"])
    lane = result.stages["lane beta 1"]
    rows = read_table(ArtifactStore(finished[1].store), lane, LINEARS_FILE).to_pylist()
    for layer, share in enumerate([0.45, 0.5, 0.55]):
        zeros, weights = (
            sum(row[name] for row in rows if row["layer"] == layer) for name in ("zeros", "weights")
        )
        assert zeros / weights == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strategy": "projections", "trials": 20}, "Give at least 23"),
        ({"strategy": "projections", "exclude": "(?<!q_proj)$"}, "at least two are needed"),
        ({"exclude": "^1[.]"}, r"leaves nothing to prune in the layers \[1\]"),
        ({"allocator": "er_plus", "betas": None}, "er_plus only uses the shapes of the linears"),
        ({"pattern": "2:5", "sparsity": 0.6, "betas": None}, "which the pattern 2:5 does not divide"),
        ({"allocator": {"method": "given", "layers": [0.5, 0.5]}, "betas": None}, "2 sparsities were given"),
        ({"allocator": {"method": "given", "layers": [0.5, 0.6, 0.6]}, "betas": None}, "weighted mean 0.566"),
    ],
)
def test_settings_that_the_model_does_not_allow_are_refused_before_the_import(
    run_search, tmp_path, changes, named
):
    store = tmp_path / "store"
    with pytest.raises(ValueError, match=named):
        run_search(str(store), **changes)
    assert list(ArtifactStore(str(store)).artifacts()) == []
