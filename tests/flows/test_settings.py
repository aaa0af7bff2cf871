"""Settings: what a form, a JSON document or the command line may hold."""

import pytest
from pydantic import ValidationError

from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from layerwise.pruners.magnitude import Magnitude
from layerwise.pruners.wanda import Wanda

LEAST = {"model": "demo", "sparsity": 0.5}


@pytest.mark.parametrize("settings", [Search, SearchRuntime])
def test_every_field_says_what_it_is_in_the_form_that_prefect_shows(settings):
    definition = search.parameters.model_dump()["definitions"][settings.__name__]
    assert set(definition["properties"]) == set(settings.model_fields)
    for name, field in definition["properties"].items():
        assert field.get("description", "").rstrip().endswith((".", ").")), name
        assert "default" in field or name in definition["required"], name


def test_a_model_and_a_sparsity_are_enough():
    assert Search.model_json_schema()["required"] == ["model", "sparsity"]
    assert SearchRuntime.model_json_schema()["required"] == ["store"]
    settings = Search(**LEAST)
    assert settings.pruner == Wanda()
    assert settings.allocation.step == 0.002


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparsity": 0.0}, "sparsity"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"sparsity": "half"}, "sparsity"),
        ({"sparsty": 0.5}, "sparsty"),
        ({"pruner": "random"}, "pruner"),
        ({"pruner": {"method": "wanda", "block_size": 3}}, "block_size"),
        ({"calibration_mode": "none"}, "calibration_mode"),
        ({"calibration_windows": 0}, "calibration_windows"),
        ({"recover": "refits"}, "recover"),
        ({"recover": {"method": "refit", "alpha": 2}}, "alpha is 2; it must be from 0 to 1"),
        ({"recover": {"method": "train", "damping": -1}}, "damping is -1"),
        ({"recover_windows": 8}, "there is no recovery"),
        ({"recover": "refit", "strategy": "race"}, "every round would recover all plans again"),
        ({"recover": "refit", "calibration_mode": "sequential"}, "Set calibration_mode to dense"),
        ({"calibration_windows": "all"}, "calibration_windows"),
        ({"calibration_windows": None}, "calibration_windows"),
        ({"calibration": "c4:4,ptb:2", "calibration_windows": 5}, r"is 5, but .*\(c4:4,ptb:2\) add up to 6"),
        ({"calibration": "c4,ptb", "calibration_windows": 1}, "is 1, which is too few for the 2 texts"),
        ({"calibration": "c4:4,ptb"}, "number of windows for some of its texts, but not for ptb"),
        ({"calibration": "c4:4,ptb:0"}, "has 0 windows of ptb"),
        ({"calibration": "c4:4,ptb:1000000"}, "add up to 1000004, more than 1000000"),
        ({"calibration": "c4:4,ptb:2,a.txt"}, "but not for ptb:2,a.txt"),
        ({"selection_windows": 1}, "selection_windows"),
        ({"seqlen": 1}, "seqlen"),
        ({"betas": ["steep"]}, "betas"),
        ({"betas": []}, "betas"),
        ({"dtype": "int8"}, "dtype"),
        ({"betas": [0.1], "beta_step": 0.1}, "betas and step"),
        ({"beta_count": 3, "beta_step": 0.1}, "count and step"),
    ],
)
def test_a_search_that_means_nothing_is_refused_by_the_name_of_its_field(changes, named):
    with pytest.raises(ValidationError, match=named):
        Search.model_validate(LEAST | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_states_gib": -1}, "hidden_states_gib"),
        ({"hidden_states_gib": float("inf")}, "hidden_states_gib"),
        ({"boundary_minutes": 0}, "boundary_minutes"),
        ({"boundary_layers": 0}, "boundary_layers"),
        ({"devise": "cpu"}, "devise"),
        ({"layer_cache": ""}, "layer_cache is empty"),
        ({"layer_cache": "s3://key:SECRET@bucket/layers"}, "layer_cache is a URL; give a folder"),
        ({"layer_cache_gib": 5}, "layer_cache_gib is 5, but there is no layer_cache"),
        ({"device_memory_gib": -1}, "device_memory_gib"),
    ],
)
def test_a_runtime_that_means_nothing_is_refused_by_the_name_of_its_field(changes, named):
    with pytest.raises(ValidationError, match=named):
        SearchRuntime.model_validate({"store": "anywhere"} | changes)


SECRETS = [
    "s3://key:SECRET@bucket/text.txt",
    "s3://key:SEC/RET@bucket/text.txt",
    "https://user:SECRET@host/text.txt",
    "https://host/text.txt?X-Amz-Signature=SECRET",
    "https://host/text.txt?sv=1&sig=SECRET",
    "simplecache::https://host/text.txt?token=SECRET",
    "c4:4,file:s3://key:SECRET@bucket/text.txt:4",
]


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("field", ["model", "calibration", "selection", "test", "store"])
def test_credentials_in_a_url_are_refused_and_not_repeated(field, url):
    """They would be a parameter of the flow run, in Prefect's database, and in the store's result.json."""
    settings, least = (SearchRuntime, {}) if field == "store" else (Search, LEAST)
    with pytest.raises(ValidationError, match="holds credentials") as caught:
        settings.model_validate(least | {field: url})
    assert "SEC" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "hf:Salesforce/wikitext:validation",
        "hf://datasets/owner/name@main/text.txt",
        "s3://bucket/text.txt",
        "https://host/text.txt?download=true",
        "/home/me@work/text.txt",
        "owner/name@main",
    ],
)
def test_other_places_are_left_as_they_are(url):
    assert Search(**LEAST, calibration=url).calibration == url


def test_settings_survive_json():
    settings = Search(
        **LEAST, pruner="magnitude", betas=(0.1, 0.2), test_windows=None, calibration_windows="12"
    )
    assert (settings.calibration_windows, settings.selection_windows) == (12, "auto")
    assert settings.pruner == Magnitude()
    assert Search.model_validate_json(settings.model_dump_json()) == settings


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Search(**LEAST).sparsity = 0.6


def test_a_runtime_becomes_what_the_tasks_take(tmp_path):
    runtime = SearchRuntime(
        store="s", device="cpu", hidden_states_gib=0.5, scratch=tmp_path, boundary_minutes=2
    )
    execution = runtime.execution()
    assert execution.hidden_states_bytes == 2**29
    assert execution.scratch == tmp_path
    assert (execution.boundary_seconds, execution.boundary_layers) == (120, None)


def test_the_container_in_an_azure_url_is_no_credential():
    url = "abfs://container@account.dfs.core.windows.net/folder"
    assert Search(model=url, sparsity=0.5, selection=f"{url}/text.txt").model == url
    with pytest.raises(ValidationError, match="holds credentials"):
        Search(model="abfs://container:key@account.dfs.core.windows.net/folder", sparsity=0.5)


@pytest.mark.parametrize(
    ("fan_out", "processes", "pool"),
    [
        ("local", None, None),
        ("store", None, None),
        ("processes:4", 4, None),
        ("pool:gpu workers", None, "gpu workers"),
    ],
)
def test_a_runtime_says_who_computes(fan_out, processes, pool):
    runtime = SearchRuntime(store="here", fan_out=fan_out)
    assert (runtime.processes, runtime.pool) == (processes, pool)


@pytest.mark.parametrize(
    "fan_out", ["", "processes", "processes:0", "processes:-1", "pool:", "locally", "gpu"]
)
def test_another_place_to_compute_is_refused_by_its_field(fan_out):
    with pytest.raises(ValidationError, match="fan_out"):
        SearchRuntime(store="here", fan_out=fan_out)


def test_one_process_makes_no_groups():
    with pytest.raises(ValidationError, match=r"groups is 3, but fan_out is local"):
        SearchRuntime(store="here", groups=3)


@pytest.mark.parametrize("pattern", ["2:4", "N:8"])
def test_offsets_of_projections_are_too_small_for_a_pattern(pattern):
    with pytest.raises(
        ValueError, match=f"pattern is {pattern}, whose levels are further apart .* Leave out the pattern"
    ):
        Search(model="demo", sparsity=0.5, strategy="projections", pattern=pattern)
