"""Allocate: the plans to try, for every allocator, offset and pattern."""

import pytest

from layerwise.allocators.allocator import Given
from layerwise.allocators.depth_schedules import Erf
from layerwise.allocators.owl import OWL
from layerwise.models.skeleton import Linear
from layerwise.tasks.allocate import AllocateSettings, allocate, read_plans


def layers(*sizes):
    """Return layers of one linear each with the given numbers of weights."""
    return [[Linear("mlp", size, 1, transposed=False)] for size in sizes]


FOUR_EQUAL_LAYERS = layers(100, 100, 100, 100)
ATTENTION, MLP = (Linear(name, 16, 8, transposed=False) for name in ("self_attn.q_proj", "mlp.up_proj"))


def plans_of(store, settings, linears=FOUR_EQUAL_LAYERS):
    return read_plans(store, allocate.fn(store, linears, settings, None))


def test_plans_are_sorted_by_beta_with_uniform_first_and_without_duplicates(store):
    plans = plans_of(store, AllocateSettings(0.5, betas=(0.2, 0.1, 0.2)))
    assert [plan.beta for plan in plans] == [0.0, 0.1, 0.2]
    assert plans[0].layers == (0.5, 0.5, 0.5, 0.5)
    assert plans[2].layers == pytest.approx((0.2, 0.4, 0.6, 0.8))


def test_a_list_of_betas_may_contain_uniform(local_store):
    assert [plan.beta for plan in plans_of(local_store, AllocateSettings(0.5, betas=(0.0,)))] == [0.0]


def test_a_step_gives_its_multiples_within_the_legal_range(local_store):
    # Sparsity 0.7, four layers: the last layer reaches 1 at beta 2 x 0.3 / 3 = 0.2.
    plans = plans_of(local_store, AllocateSettings(0.7, step=0.06))
    assert [plan.beta for plan in plans] == pytest.approx([0.0, 0.06, 0.12, 0.18])


def test_a_count_covers_the_legal_range_to_its_end(local_store):
    plans = plans_of(local_store, AllocateSettings(0.7, count=2))
    assert [plan.beta for plan in plans] == pytest.approx([0.0, 0.1, 0.2])
    assert plans[-1].layers[-1] == pytest.approx(1.0)


def test_layers_of_unequal_size_keep_the_overall_sparsity(local_store):
    sizes = [100, 300, 50]
    for plan in plans_of(local_store, AllocateSettings(0.5, count=3), layers(*sizes)):
        removed = sum(size * sparsity for size, sparsity in zip(sizes, plan.layers, strict=True))
        assert removed == pytest.approx(0.5 * sum(sizes))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "nothing"),
        ({"betas": (0.1,), "step": 0.1}, "betas and step"),
        ({"count": 1, "step": 0.1}, "count and step"),
    ],
)
def test_the_betas_are_given_in_exactly_one_way(given, named):
    with pytest.raises(ValueError, match=f"given by {named}; give exactly one"):
        AllocateSettings(0.5, **given)


@pytest.mark.parametrize("beta", [-0.1, 0.4])
def test_a_beta_outside_of_the_legal_range_is_refused_and_leaves_no_artifact(local_store, beta):
    with pytest.raises(ValueError, match=r"outside the legal range \[0, 0.33333\]"):
        allocate.fn(local_store, FOUR_EQUAL_LAYERS, AllocateSettings(0.5, betas=(beta,)), None)
    assert list(local_store.artifacts()) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"count": 255},
        {"count": 10**9},
        {"step": 0.001},
        {"step": 1e-12},
        {"step": 5e-324},
        {"betas": tuple(number / 1000 for number in range(1, 256))},
        {"count": 100, "offsets": (-0.1, 0.1)},
    ],
)
def test_more_plans_than_fit_into_one_group_are_refused_before_any_is_computed(settings):
    with pytest.raises(ValueError, match="at most 255"):
        AllocateSettings(0.5, **settings).plans(FOUR_EQUAL_LAYERS)


def test_the_same_betas_are_the_same_artifact(local_store):
    settings = AllocateSettings(0.5, betas=(0.1,))
    first = allocate.fn(local_store, FOUR_EQUAL_LAYERS, settings, None)
    assert allocate.fn(local_store, FOUR_EQUAL_LAYERS, settings, None) == first
    assert allocate.fn(local_store, layers(200, 100), settings, None).key != first.key


def test_another_allocator_is_tried_at_its_default_strength_next_to_uniform(local_store):
    plans = plans_of(local_store, AllocateSettings(0.7, allocator=Erf(0.05)))
    assert [plan.beta for plan in plans] == [0.0, 0.05]
    assert plans[0].layers == (0.7,) * 4
    assert list(plans[1].layers) == sorted(plans[1].layers)
    assert sum(plans[1].layers) == pytest.approx(2.8)


def test_another_allocator_is_tried_at_the_strengths_of_a_list(local_store):
    plans = plans_of(local_store, AllocateSettings(0.7, betas=(0.1, 0.02), allocator=Erf()))
    assert [plan.beta for plan in plans] == [0.0, 0.02, 0.1]


def test_scores_decide_by_layer_or_by_linear():
    by_layer = AllocateSettings(0.5, allocator=OWL(spread=0.1))
    assert by_layer.plans(layers(100, 100), (1.0, 3.0))[1].layers == pytest.approx((0.6, 0.4))
    by_linear = AllocateSettings(0.5, allocator=OWL(spread=0.1), granularity="linear")
    (layer,) = by_linear.plans([[ATTENTION, MLP]], (1.0, 3.0))[1].layers
    assert layer == pytest.approx((0.6, 0.4))


def test_every_beta_is_tried_with_every_offset_and_uniform_without_offset_comes_first(local_store):
    linears = [[ATTENTION, MLP]] * 2
    plans = plans_of(local_store, AllocateSettings(0.5, betas=(0.1,), offsets=(-0.2, 0.2)), linears)
    points = [(plan.beta, plan.offset) for plan in plans]
    assert points == [(0.0, 0.0), (0.0, -0.2), (0.0, 0.2), (0.1, -0.2), (0.1, 0.0), (0.1, 0.2)]
    assert plans[2].layers[0] == pytest.approx((0.6, 0.4))


def test_a_mixed_pattern_gives_every_layer_a_level(local_store):
    plans = plans_of(local_store, AllocateSettings(0.5, betas=(0.1,), pattern="N:8"))
    assert plans[1].layers == (0.375, 0.5, 0.5, 0.625)  # nearest to 0.35, 0.45, 0.55, 0.65


def test_a_fixed_pattern_leaves_the_uniform_plan_only(local_store):
    plans = plans_of(local_store, AllocateSettings(0.5, pattern="2:4"))
    assert [(plan.beta, plan.layers) for plan in plans] == [(0.0, (0.5,) * 4)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target": 0.6, "pattern": "2:4"}, "removes 0.5 of the weights"),
        ({"target": 0.5, "pattern": "2:4", "betas": (0.1,)}, "nothing to allocate"),
        ({"target": 0.5, "pattern": "2:4", "allocator": OWL()}, "nothing to allocate"),
        ({"target": 0.5, "allocator": OWL(), "step": 0.1}, "strengths of owl are given by step"),
        ({"target": 0.5, "allocator": Given((0.5,)), "betas": (0.1,)}, "sparsities are given"),
        ({"target": 0.5, "betas": (0.1,), "granularity": "linear"}, "atp only uses the depth of a layer"),
        (
            {"target": 0.5, "allocator": OWL(), "granularity": "linear", "offsets": (0.1,)},
            "cannot be combined with a sparsity per linear",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        AllocateSettings(**settings)


def test_kinds_of_linears_differ_by_their_offsets_in_every_layer():
    settings, linears = AllocateSettings(0.5, betas=(0.2,)), [[ATTENTION, MLP]] * 2
    _, steep = settings.plans(linears)
    plan = settings.plan_of_kinds(7.0, steep, {ATTENTION.name: 0.1, MLP.name: -0.1}, linears)
    assert plan.beta == 7.0
    assert [layer[0] - layer[1] for layer in plan.layers] == pytest.approx([0.2, 0.2])
    assert plan.layers[1][0] - plan.layers[0][0] == pytest.approx(0.2)
    sizes = [[linear.numel for linear in layer] for layer in linears]
    assert sum(plan.by_layer(sizes)) == pytest.approx(1.0, abs=1e-12)


def test_missing_kinds_and_clipped_sparsities_keep_the_target():
    settings, linears = AllocateSettings(0.5, betas=(0.4,)), [[ATTENTION, MLP], [MLP], [ATTENTION, MLP]]
    _, steep = settings.plans(linears)
    plan = settings.plan_of_kinds(1.0, steep, {ATTENTION.name: 0.3, MLP.name: -0.3}, linears)
    assert [len(layer) for layer in plan.layers] == [2, 1, 2]
    shares = [share for layer in plan.layers for share in layer]
    assert (min(shares), max(shares)) == (0.0, 1.0)
    assert sum(shares) == pytest.approx(2.5, abs=1e-12)
