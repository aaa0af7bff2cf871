"""Losses, perplexity and the paired comparison of two plans."""

import math

import pytest
import torch

from layerwise.calibration.capture import capture_layers, embed_windows
from layerwise.scoring.perplexity import PairedDifference, paired_difference, perplexity, window_losses


def last_hidden_states(tiny, input_ids, dtype=torch.float32):
    model = tiny.streamed(dtype)
    hidden_states = torch.empty(*input_ids.shape, 32, dtype=dtype)
    embed_windows(model, input_ids, hidden_states, 0)
    for _ in capture_layers(model, tiny.layers(), hidden_states, calibration_windows=0):
        pass
    return model, hidden_states


def reference_losses(reference, input_ids) -> list[float]:
    """Compute losses one window at a time, every position separately."""
    losses = []
    for window in input_ids:
        logits = reference(input_ids=window[None], use_cache=False).logits[0].double()
        surprise = [-torch.log_softmax(logits[t], dim=0)[window[t + 1]] for t in range(len(window) - 1)]
        losses.append(float(torch.stack(surprise).mean()))
    return losses


@pytest.mark.parametrize("family", ["llama", "gemma2-window", "opt-projected", "gpt2", "bloom"])
def test_losses_are_the_cross_entropy_of_the_models_own_logits(tiny_model, random_windows_of, family):
    tiny, input_ids = tiny_model(family), random_windows_of(3)
    losses = window_losses(*last_hidden_states(tiny, input_ids), input_ids)
    assert losses == pytest.approx(reference_losses(tiny.reference, input_ids), abs=1e-5)
    assert max(losses) - min(losses) > 0.01


@pytest.mark.parametrize("positions", [1, 4, 5, 15, 16])
def test_losses_do_not_depend_on_the_number_of_positions_at_a_time(
    tiny_model, random_windows_of, monkeypatch, positions
):
    tiny, input_ids = tiny_model(), random_windows_of(2)
    monkeypatch.setattr("layerwise.models.streaming.LOSS_POSITIONS", positions)
    losses = window_losses(*last_hidden_states(tiny, input_ids), input_ids)
    assert losses == pytest.approx(reference_losses(tiny.reference, input_ids), abs=1e-5)


def test_losses_of_a_bfloat16_model_are_computed_in_float32(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model(), random_windows_of(3)
    losses = window_losses(*last_hidden_states(tiny, input_ids, torch.bfloat16), input_ids)
    assert losses == pytest.approx(reference_losses(tiny.cast(torch.bfloat16), input_ids), abs=1e-5)
    assert losses != [float(torch.tensor(loss).bfloat16()) for loss in losses]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary_size(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model(), random_windows_of(2)
    tiny.checkpoint["lm_head.weight"].zero_()
    losses = window_losses(*last_hidden_states(tiny, input_ids), input_ids)
    assert perplexity(losses) == pytest.approx(61)


def test_perplexity_is_that_of_all_tokens_together():
    assert perplexity([math.log(2), math.log(8)]) == pytest.approx(4)
    assert perplexity([0.0]) == 1


def test_the_paired_difference_of_three_windows_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, standard error 1 / sqrt(3).
    difference = paired_difference([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert difference.mean == pytest.approx(2)
    assert difference.t == pytest.approx(2 * 3**0.5)
    assert not difference.significant  # Student's t for 2 degrees of freedom: 4.303


def test_the_better_plan_has_a_negative_difference():
    # Differences -1, -3: mean -2, standard deviation sqrt(2), standard error 1.
    difference = paired_difference([1.0, 2.0], [2.0, 5.0])
    assert (difference.mean, difference.t) == (-2, pytest.approx(-2))
    assert paired_difference([2.0, 5.0], [1.0, 2.0]).mean == 2


def test_differences_between_windows_do_not_affect_the_comparison():
    difficulty = [0.0, 10.0, -10.0, 100.0]
    gaps = [1.0, 2.0, 1.0, 2.0]
    plain = paired_difference(gaps, [0.0] * 4)
    shifted = paired_difference([a + b for a, b in zip(gaps, difficulty, strict=True)], difficulty)
    assert shifted.t == pytest.approx(plain.t)


def test_the_t_of_one_window_is_undefined():
    assert paired_difference([2.0], [1.5]) == PairedDifference(0.5, None, 1)
    assert not paired_difference([2.0], [1.5]).significant


def test_equal_plans_do_not_differ():
    same = paired_difference([2.0, 3.0], [2.0, 3.0])
    assert same == PairedDifference(0, None, 2)
    assert not same.significant


@pytest.mark.parametrize(
    "t, windows, significant",
    [
        (1.95, 1000, False),
        (-2.01, 1000, True),
        (2.01, 16, False),  # Student's t, 15 degrees of freedom: 2.131
        (-2.2, 16, True),
        (12.0, 2, False),  # 1 degree of freedom: 12.706
        (13.0, 2, True),
        (None, 16, False),
    ],
)
def test_a_difference_is_significant_beyond_students_t_for_its_windows(t, windows, significant):
    assert PairedDifference(0.1, t, windows).significant is significant


@pytest.mark.parametrize("losses, others", [([1.0, 2.0], [1.0]), ([1.0], [1.0, 2.0]), ([], [])])
def test_plans_scored_on_different_windows_are_not_compared(losses, others):
    with pytest.raises(ValueError, match=f"got {len(losses)} and {len(others)} losses"):
        paired_difference(losses, others)


def test_half_an_interval_is_so_many_standard_errors_as_students_t_says_for_the_windows():
    # Three windows, two degrees of freedom: 4.31 standard errors, and one error is .2 / 2 nats.
    assert PairedDifference(0.2, 2.0, 3).half_interval == pytest.approx(0.431)
    assert PairedDifference(-0.2, -2.0, 3).half_interval == pytest.approx(0.431)


@pytest.mark.parametrize("t", [None, 0.0])
def test_there_is_no_interval_without_a_standard_error(t):
    assert PairedDifference(0.0, t, 3).half_interval is None
