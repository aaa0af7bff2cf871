"""Capture: hidden states are the model's own, and statistics include only the calibration windows."""

import pytest
import torch

from layerwise.calibration.capture import capture_layers, embed_windows

pytestmark = pytest.mark.usefixtures("two_windows_at_a_time")


def embedded(model, input_ids, calibration_windows):
    hidden_states = torch.empty(*input_ids.shape, 32)
    embed_windows(model, input_ids, hidden_states, calibration_windows)
    return hidden_states


@pytest.mark.parametrize("family", ["llama", "gemma2-window", "gpt2", "bloom"])
def test_hidden_states_after_each_layer_are_those_of_the_whole_model(
    tiny_model, random_windows_of, layer_outputs, family
):
    tiny, input_ids = tiny_model(family), random_windows_of(5)
    model = tiny.streamed()
    hidden_states = embedded(model, input_ids, 3)
    expected = layer_outputs(tiny.reference, tiny.layers_name, input_ids)
    for captured in capture_layers(model, tiny.layers(), hidden_states, calibration_windows=3):
        torch.testing.assert_close(hidden_states, expected[captured.index], rtol=1e-5, atol=1e-4)
    assert captured.index == 3


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt2",
        "falcon",
        "opt",
        "gemma4",
        "recurrent-gemma",
    ],
)
def test_statistics_are_those_of_the_inputs_of_the_calibration_windows(
    tiny_model, random_windows_of, linear_inputs, family
):
    tiny, input_ids = tiny_model(family), random_windows_of(5)
    model = tiny.streamed()
    hidden_states = embedded(model, input_ids, 3)
    for captured in capture_layers(model, tiny.layers(), hidden_states, calibration_windows=3):
        layer_name = f"{tiny.layers_name}.{captured.index}"
        inputs = linear_inputs(tiny.reference, layer_name, input_ids[:3])
        assert captured.statistics.keys() == inputs.keys()
        for name, statistics in captured.statistics.items():
            expected = torch.cat(inputs[name]).double().norm(dim=0).float()
            torch.testing.assert_close(statistics.norms, expected, rtol=1e-4, atol=1e-5)
            assert statistics.tokens == 3 * 16


def test_other_windows_do_not_affect_the_statistics(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model(), random_windows_of(5)
    seen = []
    for windows in (input_ids[:3], input_ids):
        model = tiny.streamed()
        hidden_states = embedded(model, windows, 3)
        captured = list(capture_layers(model, tiny.layers(), hidden_states, calibration_windows=3))
        seen.append([layer.statistics for layer in captured])
    for alone, beside_others in zip(*seen, strict=True):
        for name in alone:
            assert torch.equal(alone[name].sum_of_squares, beside_others[name].sum_of_squares)


def test_resuming_in_the_middle_gives_the_bytes_of_an_uninterrupted_pass(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model(), random_windows_of(5)
    model = tiny.streamed()
    hidden_states = embedded(model, input_ids, 3)
    undisturbed, middle = {}, None
    for captured in capture_layers(model, tiny.layers(), hidden_states, calibration_windows=3):
        undisturbed[captured.index] = captured.statistics
        if captured.index == 1:
            middle = hidden_states.clone()
    resumed = capture_layers(tiny.streamed(), tiny.layers(first=2), middle, calibration_windows=3, first=2)
    statistics = {captured.index: captured.statistics for captured in resumed}
    assert list(statistics) == [2, 3]
    assert torch.equal(middle, hidden_states)
    for index in (2, 3):
        for name, inputs in statistics[index].items():
            assert torch.equal(inputs.sum_of_squares, undisturbed[index][name].sum_of_squares)


def test_all_windows_are_embedded_and_the_embedding_is_released(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model(), random_windows_of(5)
    model = tiny.streamed()
    hidden_states = embedded(model, input_ids, 3)
    assert torch.equal(hidden_states, tiny.reference.get_input_embeddings()(input_ids))
    assert model.model.get_input_embeddings().weight.is_meta


def test_a_pass_without_calibration_windows_only_advances(tiny_model, random_windows_of, layer_outputs):
    tiny, input_ids = tiny_model(), random_windows_of(5)
    model = tiny.streamed()
    hidden_states = embedded(model, input_ids, 0)
    captured = list(capture_layers(model, tiny.layers(), hidden_states, calibration_windows=0))
    assert all(inputs.tokens == 0 for layer in captured for inputs in layer.statistics.values())
    expected = layer_outputs(tiny.reference, tiny.layers_name, input_ids)[-1]
    torch.testing.assert_close(hidden_states, expected, rtol=1e-5, atol=1e-4)
