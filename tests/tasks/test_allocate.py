"""Allocate: the plans that are tried, as an artifact."""

import pytest

from tasks.allocate import AllocateSettings, allocate, read_plans

FOUR_EQUAL_LAYERS = [100, 100, 100, 100]


def plans_of(store, settings, layer_sizes=FOUR_EQUAL_LAYERS):
    return read_plans(store, allocate.fn(store, layer_sizes, settings))


def test_betas_are_tried_by_rising_beta_with_uniform_first_and_each_once(store):
    plans = plans_of(store, AllocateSettings(0.5, betas=(0.2, 0.1, 0.2)))
    assert [plan.beta for plan in plans] == [0.0, 0.1, 0.2]
    assert plans[0].layers == (0.5, 0.5, 0.5, 0.5)
    assert plans[2].layers == pytest.approx((0.2, 0.4, 0.6, 0.8))


def test_a_list_may_hold_uniform_itself(local_store):
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
    for plan in plans_of(local_store, AllocateSettings(0.5, count=3), sizes):
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
def test_a_beta_that_no_model_of_this_depth_can_have_is_refused_and_leaves_nothing(local_store, beta):
    with pytest.raises(ValueError, match=r"outside of the legal range \[0, 0.33333\]"):
        allocate.fn(local_store, FOUR_EQUAL_LAYERS, AllocateSettings(0.5, betas=(beta,)))
    assert list(local_store.artifacts()) == []


@pytest.mark.parametrize("settings", [AllocateSettings(0.5, count=255), AllocateSettings(0.5, step=0.001)])
def test_more_lanes_than_one_ranking_can_tell_apart_are_refused_at_once(settings):
    with pytest.raises(ValueError, match="at most 255"):
        settings.plans(FOUR_EQUAL_LAYERS)


def test_the_same_betas_are_the_same_artifact(local_store):
    first = allocate.fn(local_store, FOUR_EQUAL_LAYERS, AllocateSettings(0.5, betas=(0.1,)))
    assert allocate.fn(local_store, FOUR_EQUAL_LAYERS, AllocateSettings(0.5, betas=(0.1,))) == first
    assert allocate.fn(local_store, [200, 100], AllocateSettings(0.5, betas=(0.1,))).key != first.key
