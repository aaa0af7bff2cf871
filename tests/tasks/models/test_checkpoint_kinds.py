"""Checkpoints whose files differ from a text model's: multimodal models, other layouts, quantized weights.

The reference is transformers: what it computes and saves for the same folder.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.utils.quantization_config import FineGrainedFP8Config

from layerwise.sparse.engines import weight_bytes
from layerwise.tasks.compress import require_compressible
from layerwise.tasks.import_checkpoint import import_checkpoint, inspect_source
from layerwise.tasks.models.model_in_folder import model_in_folder
from layerwise.tasks.models.streamed import linears_by_layer
from layerwise.tasks.models.weight_conversion import require_same_conversions
from layerwise.tasks.models.whole_model import whole_model
from layerwise.tasks.results.evaluation import read_test
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.sources.model_source import find_source
from tests.tasks.conftest import lively

TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 64}
TEXT = TOKENS | SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
# The encoder has as many layers as the language model, which must not be mistaken for them.
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGES = ENCODER | {"image_size": 16, "patch_size": 8}
QWEN_IMAGES = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
PLACEHOLDER = 96  # a token that stands for an image; text may hold it all the same
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def mrope(**settings) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **settings}}


def gemma3() -> PreTrainedModel:
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    text = TEXT | kinds | {"sliding_window": 5}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=IMAGES, mm_tokens_per_image=4, image_token_index=PLACEHOLDER
        )
    )


def mistral3() -> PreTrainedModel:
    return Mistral3ForConditionalGeneration(
        Mistral3Config(vision_config=IMAGES, text_config=TEXT, image_token_index=PLACEHOLDER)
    )


def qwen2_5_vl() -> PreTrainedModel:
    images = QWEN_IMAGES | {"fullatt_block_indexes": [1]}
    text = TEXT | mrope(mrope_section=[1, 1, 2])
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=images))


def qwen3_vl() -> PreTrainedModel:
    images = QWEN_IMAGES | {"deepstack_visual_indexes": [1]}
    text = TEXT | mrope(mrope_section=[2, 1, 1], mrope_interleaved=True)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=images))


def qwen3_5() -> PreTrainedModel:
    rope = mrope(mrope_section=[1, 1, 2], partial_rotary_factor=1.0)
    kinds = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    text = TEXT | LINEAR_ATTENTION | rope | kinds
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=QWEN_IMAGES))


def llava() -> PreTrainedModel:
    text, images = {"model_type": "llama", **TEXT}, {"model_type": "clip_vision_model", **IMAGES}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=images, text_config=text, image_token_index=PLACEHOLDER)
    )


def smolvlm() -> PreTrainedModel:
    text = {"model_type": "llama", **TEXT}
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(image_token_id=PLACEHOLDER, vision_config=IMAGES, text_config=text, pad_token_id=0)
    )


MULTIMODAL = {
    each.__name__: each for each in (gemma3, mistral3, qwen2_5_vl, qwen3_vl, qwen3_5, llava, smolvlm)
}


def olmo_hybrid(**settings) -> PreTrainedModel:
    """A language model whose files hold three convolutions where the model has one."""
    kinds = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    return OlmoHybridForCausalLM(OlmoHybridConfig(**TEXT, **LINEAR_ATTENTION, **kinds, **settings))


def mamba() -> PreTrainedModel:
    """A model that multiplies by the weight of one of its linears without calling it."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**shape, **TOKENS))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def check_search(run, auto_class) -> dict[str, torch.Tensor]:
    """Compare the dense model and an export with transformers; return the tensors of the export."""
    (lane,) = run.branch(0.25)
    tested, folder = read_test(run.store, run.evaluate(0.0, 0.25)), Path(run.store.location(run.export(lane)))
    for place, measured in ((run.folder, tested.dense), (folder, tested.best)):
        model, info = auto_class.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values())
        losses = torch.tensor(run.losses(model.eval(), "test"))
        assert measured == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    source, result = tensors_of(run.folder), tensors_of(folder)
    pruned = {
        run.checkpoint.layer_tensors(index)[linear.weight_name].name
        for index, layer in enumerate(run.linears)
        for linear in layer
    }
    assert set(result) == set(source)
    changed = {name for name, weight in source.items() if not torch.equal(result[name], weight)}
    assert changed == pruned
    for name in pruned:
        kept = result[name] != 0
        assert torch.equal(source[name][kept], result[name][kept])
    zeros = sum(int((result[name] == 0).sum()) for name in pruned)
    assert zeros == round(0.5 * sum(source[name].numel() for name in pruned))
    assert (folder / "config.json").read_bytes() == (run.folder / "config.json").read_bytes()
    return result


@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_language_model_of_a_multimodal_model_is_pruned_and_the_rest_is_copied(small_run, family):
    run = small_run(MULTIMODAL[family]())
    result = check_search(run, AutoModelForImageTextToText)
    assert any("visual" in name or "vision" in name for name in result)
    if (
        type(run.checkpoint.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    ):  # transformers opens it as a text model as well
        exported = Path(run.store.location(run.export(run.branch(0.25)[0])))
        model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
        assert not info["missing_keys"]
        losses = torch.tensor(run.losses(model.eval(), "test"))
        tested = read_test(run.store, run.evaluate(0.0, 0.25))
        assert tested.best == pytest.approx(losses.mean().exp().item(), rel=1e-5)


def test_the_export_of_a_multimodal_model_has_few_shards_and_everything_to_load_it(save_model, small_run):
    folder = save_model(gemma3())
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    run = small_run(folder)
    exported = Path(run.store.location(run.export(run.branch(0.25)[0])))
    assert (exported / "preprocessor_config.json").read_text() == '{"do_resize": true}'
    # Embedding, final norm, three layers, and the encoder in files of the size of a layer.
    assert len(list(exported.glob("*.safetensors"))) < 12
    assert "AutoModelForMultimodalLM.from_pretrained" in (exported / "README.md").read_text()
    assert type(AutoModelForCausalLM.from_pretrained(exported)) is Gemma3ForConditionalGeneration
    with pytest.raises(ValueError, match="gemma3 is multimodal: such a model cannot be stored without"):
        require_compressible(run.checkpoint)


def test_a_head_that_is_stored_apart_is_not_shared_if_the_configuration_does_not_say_so(
    save_model, small_run, caplog
):
    model = Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config=IMAGES, text_config=TEXT, image_token_index=PLACEHOLDER, tie_word_embeddings=False
        )
    )
    folder = save_model(lively(model))
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    run = small_run(folder)
    assert "As in transformers, it is not shared" in caplog.text
    check_search(run, AutoModelForImageTextToText)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "lacks 1 of .* its image or sound encoder: .*{}"),
        (
            lambda tensors, name: tensors.update({name: tensors[name][:5].contiguous()}),
            r"{} in .*safetensors .*has the shape \(5",
        ),
    ],
    ids=["missing", "of another shape"],
)
def test_tensors_of_an_encoder_that_do_not_fit_are_refused_by_name(
    save_model, edit_tensors, local_store, edit, message
):
    folder = save_model(gemma3())
    name = next(name for name in load_file(folder / "model.safetensors") if name.endswith("fc1.weight"))
    edit_tensors(folder, lambda tensors: edit(tensors, name))
    with pytest.raises(ValueError, match=message.format(r"[\w.]*fc1\.weight")):
        import_checkpoint(local_store, str(folder))


@pytest.mark.parametrize("make", [gemma3, llava, qwen2_5_vl])
def test_names_as_in_the_state_dict_are_read_as_well(save_model, local_store, make):
    folder, model = save_model(make()), make()
    names = set(load_file(folder / "model.safetensors"))
    state = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    state = {name: weight for name, weight in state.items() if name not in model.all_tied_weights_keys}
    assert set(state) != names
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = import_checkpoint(local_store, str(folder))
    for index, layer in enumerate(checkpoint.layers()):
        for name, weight in layer.items():
            assert torch.equal(weight, state[f"{checkpoint.layer_prefix}.{index}.{name}"])


def test_an_encoder_takes_no_memory_and_is_not_measured(save_model, local_store):
    checkpoint = import_checkpoint(local_store, str(save_model(gemma3())))
    assert not any("vision" in name for name in checkpoint.outer_tensors())
    model = whole_model(checkpoint, "float32", Execution())
    encoder = model.get_submodule("model.vision_tower")
    assert {parameter.untyped_storage().nbytes() for parameter in encoder.parameters()} == {4}
    linears = [linear for layer in linears_by_layer(checkpoint.index, 8) for linear in layer]
    head = model.lm_head.weight.numel()
    assert weight_bytes(model) == 4 * (sum(linear.numel for linear in linears) + head)


def test_layers_that_transformers_ignores_are_copied(save_model, edit_tensors, local_store, caplog):
    folder = save_model(qwen3_5())
    prediction = {"mtp.layers.0.mlp.up_proj.weight": torch.ones(48, 32), "mtp.norm.weight": torch.ones(32)}
    edit_tensors(folder, lambda tensors: tensors.update(prediction))
    unused = {
        tensor.name
        for tensor in import_checkpoint(local_store, str(folder)).source_tensors()[None]
        if not tensor.is_used
    }
    assert prediction.keys() <= unused
    assert "not used" not in caplog.text


def test_tensors_in_another_layout_are_converted_for_the_model_and_back_for_the_export(small_run):
    run = small_run(olmo_hybrid())
    stored = [tensor.name for tensor in run.checkpoint.source_tensors()[0] if "conv1d" in tensor.name]
    assert len(stored) == 3
    in_the_model = [name for name in run.checkpoint.layer_tensors(0) if "conv1d" in name]
    assert in_the_model == ["linear_attn.conv1d.weight"]
    with pytest.raises(ValueError, match="imported with another version of transformers"):
        require_same_conversions((), run.checkpoint.index.tensors, "the model")
    check_search(run, AutoModelForCausalLM)
    opened = model_in_folder(find_source(str(run.folder)).folder, torch.float32)
    assert run.losses(opened, "test") == pytest.approx(run.losses(run.transformers_model(), "test"), rel=1e-6)


def test_tensors_in_another_layout_that_do_not_fit_are_refused_by_name(save_model, edit_tensors, local_store):
    folder = save_model(olmo_hybrid())
    name = "model.layers.0.linear_attn.k_conv1d.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:, :, :2].contiguous()}))
    with pytest.raises(
        ValueError, match=r"conversion of .*q_conv1d.* into .*linear_attn\.conv1d\.weight fails"
    ):
        import_checkpoint(local_store, str(folder))
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(
        ValueError, match=r"conversion of .*q_conv1d\.weight, .*v_conv1d\.weight into .* fails"
    ):
        import_checkpoint(local_store, str(folder))


@pytest.mark.parametrize(
    ("make", "dense"),
    [(olmo_hybrid, {"a_proj", "b_proj"}), (qwen3_5, {"in_proj_a", "in_proj_b"}), (mamba, {"dt_proj"})],
    ids=["olmo_hybrid", "qwen3_5", "mamba"],
)
def test_small_gates_and_linears_that_are_not_called_stay_dense(save_model, local_store, caplog, make, dense):
    checkpoint = import_checkpoint(local_store, str(save_model(make())))
    linears = {linear.name.rpartition(".")[2] for linear in linears_by_layer(checkpoint.index, 8)[0]}
    assert linears
    assert not linears & dense
    assert {f"{name}.weight" for name in dense} <= {
        ".".join(name.split(".")[-2:]) for name in checkpoint.layer_tensors(0)
    }
    if make is mamba:
        assert "not called by its layers" in caplog.text
        assert "0.mixer.dt_proj, 1.mixer.dt_proj" in caplog.text


def test_a_model_that_uses_a_weight_without_calling_its_linear_is_pruned(small_run):
    run = small_run(mamba())
    check_search(run, AutoModelForCausalLM)
    exported = Path(run.store.location(run.export(run.branch(0.25)[0])))
    (row,) = json.loads((exported / "sparsity.json").read_text())["dense"]
    assert (row["linear"], row["layers"]) == ("mixer.dt_proj", [0, 1])
    assert "does not call it" in row["reason"]
    assert run.checkpoint.artifact.facts["dense linears"] == [row]
    assert "dt_proj (every layer): the model does not call it" in (
        exported / "README.md"
    ).read_text().replace("\\", "")


def test_tensors_of_several_dtypes_that_make_one_weight_keep_their_dtypes(
    save_model, edit_tensors, small_run
):
    folder = save_model(lively(olmo_hybrid()).bfloat16())
    name = "model.layers.0.linear_attn.k_conv1d.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].float()}))
    run = small_run(folder)
    result = tensors_of(Path(run.store.location(run.export(run.branch(0.0)[0]))))
    source = tensors_of(folder)
    assert {n: weight.dtype for n, weight in result.items()} == {
        n: weight.dtype for n, weight in source.items()
    }
    assert all(torch.equal(result[n], source[n]) for n in source if "conv1d" in n)


def in_fp8(folder: Path, block: int) -> None:
    """Store the linears of the layers in fp8 with a scale for every block, as DeepSeek and Qwen do."""
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if "_proj" in name]:
        weight = stored[name].float()
        rows, columns = (size // block for size in weight.shape)
        blocks = weight.view(rows, block, columns, block)
        scales = blocks.abs().amax((1, 3)) / 448
        quantized = (blocks / scales[:, None, :, None]).view(weight.shape)
        stored |= {name: quantized.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))


def test_fp8_weights_are_dequantized_as_by_transformers(save_model, llama, small_run):
    folder = save_model(llama(num_hidden_layers=3, initializer_range=0.2, dtype="bfloat16").bfloat16())
    in_fp8(folder, block=16)
    settings = FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)
    expected = model.state_dict()
    described, run = inspect_source(str(folder)), small_run(folder)
    assert (described.layer_bytes, described.in_place) == (run.checkpoint.index.layer_bytes, False)
    weights = whole_model(run.checkpoint, "bfloat16", Execution()).state_dict()
    assert [name for name, weight in expected.items() if not torch.equal(weights[name], weight)] == []
    opened = model_in_folder(find_source(str(folder)).folder, torch.bfloat16).state_dict()
    assert [name for name, weight in expected.items() if not torch.equal(opened[name], weight)] == []
    exported = Path(run.store.location(run.export(run.branch(0.25)[0])))
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    result = tensors_of(exported)
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    assert set(result) == set(expected)
    for name, weight in result.items():
        assert torch.equal(weight, expected[name].where(weight != 0, 0))


def test_quantized_weights_with_missing_or_wrong_scales_are_refused_by_name(
    save_model, edit_tensors, local_store
):
    folder = save_model()
    in_fp8(folder, block=16)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(5, 2)}))
    with pytest.raises(
        ValueError, match=r"0\.mlp\.up_proj\.weight .*cannot be dequantized: .*scales of shape \(5, 2\)"
    ):
        import_checkpoint(local_store, str(folder))
    edit_tensors(folder, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    with pytest.raises(ValueError, match=r"0\.mlp\.up_proj\.weight .*stored as F8_E4M3"):
        import_checkpoint(local_store, str(folder))
