"""Values of options: every wrong one is a line that names the option, the field and the value, before anything runs."""

import re
from argparse import ArgumentParser

import pytest

from layerwise.flows.compare import Compare
from layerwise.flows.options import add_options, read_options
from layerwise.flows.pipeline.inputs import check_plans
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.settings import Search
from layerwise.models.skeleton import Linear

LINEARS = [[Linear("self_attn.q_proj", 32, 32, False), Linear("mlp.down_proj", 32, 64, False)]] * 3


def test_linears_that_stay_dense_by_default_may_be_excluded():
    settings = Search(model="demo", sparsity=0.5, exclude="dt_proj$")
    check_plans(settings, LINEARS, ["0.mixer.dt_proj"])
    with pytest.raises(ValueError, match="matches none of the model's 6 linears"):
        check_plans(settings, LINEARS, ["0.mixer.x_proj"])


def test_settings_that_only_some_models_allow_are_refused_by_the_linears_of_the_model():
    of_experts = [[*layer, Linear("mlp.experts.0.up_proj", 32, 32, False)] for layer in LINEARS]
    by_expert = Search(model="demo", sparsity=0.5, allocator="owl", granularity="expert")
    check_plans(by_expert, of_experts)
    with pytest.raises(ValueError, match="granularity is expert, but no expert of the model is pruned"):
        check_plans(by_expert, LINEARS)


def read(*options: str) -> Search:
    """The settings of a search; with its plans made for a model of three layers."""
    parser = ArgumentParser()
    add_options(parser, Search)
    add_options(parser, SearchRuntime)
    arguments = parser.parse_args(["--model=demo", "--sparsity=0.5", "--store=store", *options])
    settings = read_options(arguments, Search)
    read_options(arguments, SearchRuntime)
    check_plans(settings, LINEARS)
    return settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            '--allocator={"method": "owl", "spread": "0.1"}',
            '--allocator: spread has the value "0.1"; give a number',
        ),
        (
            '--allocator={"method": "owl", "spread": true}',
            "--allocator: spread has the value true; give a number",
        ),
        (
            '--allocator={"method": "owl", "spread": -1}',
            "--allocator: the spread of OWL is -1; it must lie in",
        ),
        ('--allocator={"method": "owl", "spread": NaN}', "--allocator: .* is not valid JSON .NaN is not"),
        (
            '--allocator={"method": "erf", "log_amplification": 1e999}',
            "--allocator: log_amplification: .* finite",
        ),
        ('--allocator={"method": "owl", "method": "dsa"}', "--allocator: .*'method' occurs more than once"),
        (
            '--allocator={"method": "owl", "sprea": 0.1}',
            "--allocator: sprea: Unexpected keyword argument, got 0.1$",
        ),
        ('--allocator={"spread": 1}', "--allocator: give a method by its name, or as JSON"),
        ("--allocator=owll", "--allocator: there is no method 'owll' .did you mean 'owl'.*'alpha_pruning'"),
        ("--allocator=" + "[" * 100_000, "--allocator: .* is nested too deeply"),
        (
            f'--allocator={{"method": "owl", "spread": {"9" * 5000}}}',
            "--allocator: .*5031 characters.* is not valid",
        ),
        (
            '--allocator={"method": "given", "layers": [0.5, 0.5]}',
            "2 sparsities .* the model has 3 decoder layers",
        ),
        (
            '--allocator={"method": "given", "layers": [0.5, 0.5, 1.5]}',
            "--allocator: .* of layer 2 is 1.5; it must",
        ),
        (
            '--allocator={"method": "given", "layers": [0.5, null, 0.5]}',
            r"--allocator: layers\.1: .*got None$",
        ),
        (
            '--pruner={"method": "sparsegpt", "block_size": 1.5}',
            "--pruner: block_size: .*integer.*, got 1.5$",
        ),
        (
            '--pruner={"method": "sparsegpt", "block_size": -1}',
            "--pruner: block_size is -1; it must be from 1 to 1048576",
        ),
        (
            '--pruner={"method": "alps", "iterations": 1000000000}',
            "--pruner: iterations is 1000000000; it must be from 1 to 1000",
        ),
        (
            '--pruner={"method": "wanda_swaps", "rounds": 1000000000}',
            "--pruner: rounds is 1000000000; it must be from 0 .plain Wanda. to 1000",
        ),
        ("--betas=0.1,nan", "--betas: Input should be a finite number, got '0.1,nan'$"),
        ("--betas=inf", "--betas: Input should be a finite number, got 'inf'$"),
        ("--offsets=nan", "--offsets: Input should be a finite number"),
        ("--beta-count=1000000000", "settings: the settings give 1000000001 plans, .*at most 255"),
        ("--beta-step=1e-12", "the settings give 500000000001 plans, .*at most 255"),
        ("--beta-step=nan", "--beta-step: Input should be a finite number"),
        ("--trials=1000000000", "--trials: must be 10000 or less, got '1000000000'$"),
        ("--calibration-windows=1000000000", "--calibration-windows: must be 1000000 or less"),
        ("--seqlen=1000000000000", "--seqlen: must be 16777216 or less"),
        ("--seed=99999999999999999999", "--seed: must be 9223372036854775807 or less"),
        (
            "--model=caf\udce9",
            r"--model: the name is not valid UTF-8, .*rename the folder.*, got 'caf\\udce9'$",
        ),
        ("--groups=1000000000", "--groups: Input should be less than or equal to 255"),
        ("--hidden-states-gib=1e308", "--hidden-states-gib: Input should be less than or equal to 1000000"),
        ("--boundary-minutes=inf", "--boundary-minutes: Input should be a finite number"),
        (
            "--exclude=q_prj",
            "exclude is 'q_prj', which matches none of the model's 6 linears, such as 0.self",
        ),
        ("--exclude=proj", "exclude is 'proj', which matches every one of the model's 6 linears"),
        ("--exclude=1", "'1' leaves nothing to prune in the layers .1.: every layer needs a linear"),
    ],
)
def test_a_wrong_value_is_a_line_that_names_option_field_and_value(options, message):
    with pytest.raises(ValueError) as error:
        read(options)
    assert re.match(message, str(error.value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_values_that_pydantic_takes_for_a_number_in_an_option_stay_options():
    assert read("--sparsity=.5", "--betas=1e-2,0.1", "--exclude=q_proj$").betas == (0.01, 0.1)


def test_a_comparison_of_more_searches_than_anybody_reads_is_refused_at_once():
    parser = ArgumentParser()
    add_options(parser, Compare, without=["search"])
    seeds = ",".join(map(str, range(1001)))
    with pytest.raises(ValueError, match="these are 1001 searches, and at most 1000 can be compared"):
        read_options(parser.parse_args([f"--seeds={seeds}"]), Compare, search=read())
