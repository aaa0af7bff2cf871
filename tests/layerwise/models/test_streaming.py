"""The streamed model computes the same as the transformers model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CpmAntConfig, RwkvConfig

from layerwise.models.skeleton import UnsupportedModel
from layerwise.models.streaming import StreamedModel
from tests.tiny_configs import tiny_config

FAMILIES = [
    "llama",
    "llama-tied",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2-window",
    "gemma4",
    "gemma4-small",
    "gemma3n",
    "recurrent-gemma",
    "bamba",
    "phi3",
    "opt",
    "opt-projected",
    "gpt-neox",
    "gpt-neo",
    "gpt2",
    "falcon",
    "falcon-alibi",
    "bloom",
]


def through_all_layers(model: StreamedModel, layers, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits, computed one layer at a time."""
    hidden_states = model.embed(input_ids)
    for index, weights in enumerate(layers):
        with model.loaded(index, weights) as layer:
            hidden_states = model.run_layer(index, layer, hidden_states)
    return model.logits(hidden_states)


def reference_logits(model, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_model(tiny_model, random_windows_of, family):
    tiny, input_ids = tiny_model(family), random_windows_of(3)
    expected = reference_logits(tiny.reference, input_ids)
    logits = through_all_layers(tiny.streamed(), tiny.layers(), input_ids)
    assert expected.std() > 0.3  # otherwise a small difference would prove nothing
    assert (logits - expected).abs().max() <= 1e-4


def test_a_configuration_that_requests_other_outputs_changes_nothing(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model(), random_windows_of(3)
    expected = reference_logits(tiny.reference, input_ids)
    asked = {"return_dict": False, "output_hidden_states": True, "use_cache": True}
    tiny.reference.config.update(asked)
    logits = through_all_layers(tiny.streamed(), tiny.layers(), input_ids)
    assert (logits - expected).abs().max() <= 1e-4
    assert asked.items() <= tiny.reference.config.to_dict().items()


@pytest.mark.parametrize("family", ["mistral-window", "gemma2-window"])
def test_a_sliding_window_shorter_than_the_sequence_is_kept(tiny_model, random_windows_of, family):
    input_ids = random_windows_of(2)
    narrow, wide = tiny_model(family), tiny_model(family, sliding_window=64)
    logits = through_all_layers(narrow.streamed(), narrow.layers(), input_ids)
    assert (logits - reference_logits(narrow.reference, input_ids)).abs().max() <= 1e-4
    assert (logits - reference_logits(wide.reference, input_ids)).abs().max() > 0.1


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "falcon", "bloom", "bamba"],
)
def test_a_model_of_a_single_layer_is_streamed_like_any_other(tiny_model, random_windows_of, family):
    tiny, input_ids = tiny_model(family, num_hidden_layers=1), random_windows_of(3)
    logits = through_all_layers(tiny.streamed(), tiny.layers(), input_ids)
    assert logits.shape == (3, 16, tiny.reference.config.vocab_size)
    assert (logits - reference_logits(tiny.reference, input_ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2-window", "opt", "gpt2"])
def test_weights_are_converted_to_the_dtype_of_the_computation(tiny_model, random_windows_of, family, dtype):
    tiny, input_ids = tiny_model(family), random_windows_of(2)
    logits = through_all_layers(tiny.streamed(dtype), tiny.layers(), input_ids)
    expected = reference_logits(tiny.cast(dtype), input_ids)
    assert logits.dtype == expected.dtype == dtype
    assert (logits.float() - expected.float()).abs().max() <= 1e-4


def test_a_bfloat16_checkpoint_can_be_computed_in_float32(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model(), random_windows_of(2)
    half = {name: weight.bfloat16() for name, weight in tiny.outer().items()}
    model = StreamedModel(tiny.reference.config, half, torch.float32, torch.device("cpu"))
    layers = [{name: weight.bfloat16() for name, weight in layer.items()} for layer in tiny.layers()]
    logits = through_all_layers(model, layers, input_ids)
    rounded = tiny.cast(torch.bfloat16).float()
    assert logits.dtype == torch.float32
    assert (logits - reference_logits(rounded, input_ids)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "family", ["llama", "mistral-window", "gemma4-small", "opt-projected", "falcon-alibi"]
)
def test_batches_of_any_size_may_reach_the_layers_in_any_order(tiny_model, random_windows_of, family):
    tiny, input_ids = tiny_model(family), random_windows_of(5)
    model = tiny.streamed()
    parts = [model.embed(some_ids) for some_ids in input_ids.split(2)]  # 2, 2 and 1 windows
    for index, weights in enumerate(tiny.layers()):
        with model.loaded(index, weights) as layer:
            parts = [model.run_layer(index, layer, part) for part in reversed(parts)][::-1]
    logits = torch.cat([model.logits(part) for part in parts])
    assert (logits - reference_logits(tiny.reference, input_ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2-window", "gpt-neox", "falcon-alibi", "bloom"])
def test_hidden_states_need_not_have_been_embedded_by_the_same_process(
    tiny_model, random_windows_of, layer_outputs, family
):
    tiny, input_ids = tiny_model(family), random_windows_of(3)
    outputs = layer_outputs(tiny.reference, tiny.layers_name, input_ids)
    model = tiny.streamed()
    hidden_states = outputs[1]  # as read from a resume point
    for index, weights in enumerate(tiny.layers(first=2), 2):
        with model.loaded(index, weights) as layer:
            hidden_states = model.run_layer(index, layer, hidden_states)
            assert (hidden_states - outputs[index]).abs().max() <= 1e-4
    logits = model.logits(hidden_states)
    assert (logits - reference_logits(tiny.reference, input_ids)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt-neox", "falcon", "bloom"],
)
def test_norm_and_head_work_in_a_process_that_ran_no_layer(
    tiny_model, random_windows_of, layer_outputs, family
):
    tiny, input_ids = tiny_model(family), random_windows_of(3)
    last = layer_outputs(tiny.reference, tiny.layers_name, input_ids)[-1]
    logits = tiny.streamed().logits(last)
    assert logits.shape == (3, 16, 61)
    assert (logits - reference_logits(tiny.reference, input_ids)).abs().max() <= 1e-4


def test_the_output_of_a_layer_does_not_depend_on_the_last_embedding(tiny_model, random_windows_of):
    tiny = tiny_model("gemma2-window")
    model, weights = tiny.streamed(), tiny.layers()[0]
    states = model.embed(random_windows_of(2, seed=0))
    with model.loaded(0, weights) as layer:
        before = model.run_layer(0, layer, states)
        model.embed(random_windows_of(2, seed=1))
        model.embed(random_windows_of(2, seqlen=9))
        assert torch.equal(model.run_layer(0, layer, states), before)


def test_windows_of_another_length_get_their_own_masks_and_positions(tiny_model, random_windows_of):
    tiny = tiny_model("mistral-window")
    model = tiny.streamed()
    for seqlen in (16, 7, 23, 16):
        input_ids = random_windows_of(2, seqlen)
        logits = through_all_layers(model, tiny.layers(), input_ids)
        assert (logits - reference_logits(tiny.reference, input_ids)).abs().max() <= 1e-4


def test_the_weights_of_a_layer_are_released_after_the_block(tiny_model):
    tiny = tiny_model()
    model, weights = tiny.streamed(), tiny.layers()[1]
    with model.loaded(1, weights) as layer:
        assert layer.mlp.up_proj.weight.data_ptr() == weights["mlp.up_proj.weight"].data_ptr()
    assert all(parameter.is_meta for parameter in model.layers.parameters())


def test_the_weights_of_a_layer_are_released_after_an_error(tiny_model):
    tiny = tiny_model()
    model = tiny.streamed()
    with pytest.raises(KeyError), model.loaded(0, tiny.layers()[0]):
        raise KeyError
    assert all(parameter.is_meta for parameter in model.layers.parameters())


@pytest.mark.parametrize("family", ["gpt-neo", "llama", "bloom"])
def test_buffers_outlive_the_weights(tiny_model, random_windows_of, family):
    """GPT-Neo computes its local mask in a buffer of the layer when the layer is built."""
    tiny, input_ids = tiny_model(family), random_windows_of(2)
    model = tiny.streamed()
    through_all_layers(model, tiny.layers(), input_ids)
    assert not any(buffer.is_meta for buffer in model.model.buffers())
    logits = through_all_layers(model, tiny.layers(), input_ids)
    assert (logits - reference_logits(tiny.reference, input_ids)).abs().max() <= 1e-4


def test_a_change_to_the_given_weights_changes_the_layer(tiny_model, random_windows_of):
    tiny = tiny_model()
    model, weights = tiny.streamed(), tiny.layers()[0]
    states = model.embed(random_windows_of(1))
    with model.loaded(0, weights) as layer:
        weights["self_attn.o_proj.weight"].zero_()
        weights["mlp.down_proj.weight"].zero_()
        assert torch.equal(model.run_layer(0, layer, states), states)  # only the residual stream is left


def test_the_embedding_can_be_released_and_is_loaded_again_when_needed(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model(), random_windows_of(2)
    model = tiny.streamed()
    before = model.embed(input_ids)
    model.release_embedding()
    assert model.model.get_input_embeddings().weight.is_meta
    assert torch.equal(model.embed(input_ids), before)


def test_layers_run_and_losses_are_taken_without_the_embedding(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model(), random_windows_of(2)
    model = tiny.streamed()
    hidden_states = model.embed(input_ids)
    model.release_embedding()
    for index, weights in enumerate(tiny.layers()):
        with model.loaded(index, weights) as layer:
            hidden_states = model.run_layer(index, layer, hidden_states)
    logits = model.logits(hidden_states)
    assert (logits - reference_logits(tiny.reference, input_ids)).abs().max() <= 1e-4
    assert model.model.get_input_embeddings().weight.is_meta


def test_a_tied_embedding_is_not_released_because_it_is_the_head(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model("llama-tied"), random_windows_of(2)
    model = tiny.streamed()
    model.embed(input_ids)
    model.release_embedding()
    logits = through_all_layers(model, tiny.layers(), input_ids)
    assert (logits - reference_logits(tiny.reference, input_ids)).abs().max() <= 1e-4


def test_missing_weights_outside_the_layers_are_named(tiny_model):
    tiny = tiny_model()
    outer = tiny.outer()
    del outer["model.norm.weight"], outer["lm_head.weight"]
    with pytest.raises(ValueError, match=r"llama: no weights were given for model\.norm\.weight, lm_head\."):
        StreamedModel(tiny.reference.config, outer, torch.float32, torch.device("cpu"))


def test_missing_weights_of_a_layer_are_named_and_the_model_stays_usable(tiny_model, random_windows_of):
    tiny, input_ids = tiny_model(), random_windows_of(2)
    model = tiny.streamed()
    incomplete = tiny.layers()[2]
    del incomplete["mlp.up_proj.weight"]
    with (
        pytest.raises(ValueError, match=r"layer 2 has no weights for mlp\.up_proj\.weight"),
        model.loaded(2, incomplete),
    ):
        pytest.fail("the layer was handed out")
    logits = through_all_layers(model, tiny.layers(), input_ids)
    assert (logits - reference_logits(tiny.reference, input_ids)).abs().max() <= 1e-4


def test_a_missing_trained_buffer_of_a_layer_is_named(tiny_model):
    tiny = tiny_model("gemma4")
    incomplete = tiny.layers()[2]
    del incomplete["layer_scalar"]
    with (
        pytest.raises(ValueError, match="layer 2 has no weights for layer_scalar"),
        tiny.streamed().loaded(2, incomplete),
    ):
        pass


def test_a_layer_does_not_keep_the_weights_of_an_earlier_layer(tiny_model):
    tiny = tiny_model()
    model = tiny.streamed()
    with model.loaded(0, tiny.layers()[0]):
        pass
    with pytest.raises(ValueError, match="layer 0 has no weights for .*self_attn"), model.loaded(0, {}):
        pytest.fail("the layer was handed out")


def test_a_model_whose_layers_change_the_shape_of_the_windows_is_refused_by_name(random_windows_of):
    """CPM-Ant inserts its own prompt tokens before every window."""
    config = CpmAntConfig(
        hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=4, vocab_size=61
    )
    reference = AutoModelForCausalLM.from_config(config)
    outer = {name: weight for name, weight in reference.state_dict().items() if ".layers." not in name}
    with pytest.raises(UnsupportedModel, match="cpmant"):
        StreamedModel(config, outer, torch.float32, torch.device("cpu")).embed(random_windows_of(2))


def test_a_model_that_passes_more_than_hidden_states_between_layers_is_refused_by_name(random_windows_of):
    """RWKV passes a state from layer to layer."""
    config = RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=61)
    reference = AutoModelForCausalLM.from_config(config)
    outer = {name: weight for name, weight in reference.state_dict().items() if ".blocks." not in name}
    with pytest.raises(UnsupportedModel, match="rwkv passes more than hidden states"):
        StreamedModel(config, outer, torch.float32, torch.device("cpu")).embed(random_windows_of(3))


def test_a_layer_that_writes_to_its_input_is_refused_by_name(tiny_model, random_windows_of):
    """The input is also the input of the other lanes."""
    model = tiny_model().streamed()
    states = model.embed(random_windows_of(2))
    with pytest.raises(UnsupportedModel, match="llama lets a layer change the arguments"):
        model.run_layer(0, lambda hidden_states, **_others: hidden_states.add_(1), states)


def test_a_layer_that_keeps_something_but_tensors_for_later_layers_is_refused_by_name(
    tiny_model, random_windows_of
):
    model = tiny_model("gemma4-small").streamed()
    states = model.embed(random_windows_of(2))

    def layer(hidden_states, per_layer_input, shared_kv_states, **others):
        shared_kv_states["seen"] = True
        return hidden_states

    with pytest.raises(UnsupportedModel, match="such as shared keys and values"):
        model.run_layer(0, layer, states)


def test_the_state_has_what_later_layers_need_for_each_token(tiny_model):
    """Tokens of four bytes, and keys and values of two heads, of 8 numbers in sliding and 16 in full attention."""
    small = tiny_model("gemma4-small")
    assert small.streamed().layout.size == 32 + 1 + 2 * 2 * (8 + 16)
    assert small.streamed(torch.bfloat16).layout.size == 32 + 2 + 2 * 2 * (8 + 16)
    assert small.streamed().stores(1)
    assert not small.streamed().stores(2)
    assert tiny_model("gemma4").streamed().layout.is_plain


def test_an_output_that_the_model_uses_only_after_its_last_layer_is_kept():
    """With three layers in blocks of two, no layer receives the output of the second one, but the final norm does."""
    config = tiny_config("inkling2_text")
    shape = {"num_hidden_layers": 3, "layer_types": config.layer_types[:3], "n_layers_per_attn_res_block": 2}
    config.update(shape)
    reference = AutoModelForCausalLM.from_config(config)
    outer = {name: weight for name, weight in reference.state_dict().items() if ".layers." not in name}
    assert StreamedModel(config, outer, torch.float32, torch.device("cpu")).layout.kept == (1,)


def test_a_new_shape_does_not_load_the_embedding_permanently(tiny_model, random_windows_of, layer_outputs):
    """A resumed run does not embed windows, and the embedding of a large vocabulary needs gigabytes."""
    tiny, model = tiny_model(), tiny_model().streamed()
    model.release_embedding()
    states = layer_outputs(tiny.reference, tiny.layers_name, random_windows_of(2))[0]
    with model.loaded(1, tiny.layers()[1]) as layer:
        model.run_layer(1, layer, states)
    assert model.model.get_input_embeddings().weight.is_meta
