"""Mixtures of experts. The reference is transformers: its outputs, its routing of the tokens, and its names of tensors."""

import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DbrxForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
)
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from layerwise.allocators.sparsity_plan import OTHER_LINEARS, units_of
from layerwise.models.prunable_linears import dense_linears, dense_rows
from layerwise.models.skeleton import build_outline
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.recovery.linear_inputs import refitted_together
from layerwise.recovery.refit import Refit
from layerwise.storage.tables import read_table
from layerwise.tasks.lanes.recovered_layers import OUTCOMES_FILE, RecoveredLayers
from layerwise.tasks.models.whole_model import whole_model
from layerwise.tasks.recovery.recover import recover
from layerwise.tasks.results.evaluation import read_test
from layerwise.tasks.running.execution import Execution

TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 64}
TEXT = TOKENS | SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}
TOP_2 = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# The latent attention of DeepSeek, with sizes that blocks of 16 divide.
RANKS = {"kv_lora_rank": 16, "q_lora_rank": 16}
LATENT = RANKS | {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
ENOUGH = {"calibration": 40, "selection": 2, "test": 2}  # windows


def qwen3_moe(**settings) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT | {"head_dim": 8, "num_experts": 4} | TOP_2 | settings))


def qwen2_moe() -> PreTrainedModel:
    shared = {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**TEXT, **TOP_2, **shared, num_experts=4))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4))


def olmoe() -> PreTrainedModel:
    return OlmoeForCausalLM(OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2))


def deepseek_v2() -> PreTrainedModel:
    layers = {"n_routed_experts": 4, "first_k_dense_replace": 1}
    return DeepseekV2ForCausalLM(DeepseekV2Config(**TEXT | TOP_2 | LATENT | layers))


def deepseek_v3(**settings) -> PreTrainedModel:
    """A model whose first two layers are dense and three times as large as the others."""
    layers = {
        "n_routed_experts": 4,
        "first_k_dense_replace": 2,
        "num_hidden_layers": 4,
        "n_group": 2,
        "topk_group": 1,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**TEXT | TOP_2 | LATENT | layers | settings))


def glm4_moe() -> PreTrainedModel:
    layers = {"n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8}
    return Glm4MoeForCausalLM(Glm4MoeConfig(**TEXT, **TOP_2, **layers))


def gpt_oss(**settings) -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}
    return GptOssForCausalLM(GptOssConfig(**TEXT | experts | settings))


def llama4() -> PreTrainedModel:
    """A model whose experts get all tokens, those of other experts multiplied by zero."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_layers": [1, 2], "head_dim": 8}
    return Llama4ForCausalLM(Llama4TextConfig(**TEXT, **experts, intermediate_size_mlp=24))


def jetmoe() -> PreTrainedModel:
    """A model with experts of attention, too; those of the MLP are not in a module of the name."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    return JetMoeForCausalLM(JetMoeConfig(**TEXT | experts))


def dbrx() -> PreTrainedModel:
    """A model whose experts are in one axis of their tensor with the outputs, and are called only if they get tokens."""
    experts = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    attention = {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}
    shape = {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}
    return DbrxForCausalLM(DbrxConfig(**TOKENS, **shape, attn_config=attention, ffn_config=experts))


FAMILIES = {
    each.__name__: each
    for each in (qwen3_moe, qwen2_moe, mixtral, olmoe, deepseek_v2, deepseek_v3, glm4_moe, gpt_oss)
    + (llama4, jetmoe, dbrx)
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def linears_in(tensors: dict[str, torch.Tensor]) -> set[str]:
    """Return the tensors that hold weights of linears in decoder layers, by the names that the families give them."""
    linear = re.compile(
        r".*\.(layers|blocks)\.\d+\..*"
        r"((_proj|_proj_with_mqa|\.w[123]|put_linear|Wqkv)\.weight|experts\.((gate_up|down)_proj|mlp\.[wv][12]))"
    )
    return {name for name in tensors if linear.fullmatch(name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_experts_is_streamed_pruned_and_exported_as_it_was_stored(small_run, family):
    run = small_run(FAMILIES[family]())
    (lane,) = run.branch(0.1)
    folder = Path(run.store.location(run.export(lane)))
    tested = read_test(run.store, run.evaluate(0.0, 0.1))
    for place, measured in ((run.folder, tested.dense), (folder, tested.best)):
        model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
        assert not any(info.values())
        losses = torch.tensor(run.losses(model.eval(), "test"))
        assert measured == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    source, result = tensors_of(run.folder), tensors_of(folder)
    assert set(result) == set(source)
    pruned = linears_in(source)  # neither routers, nor gates of shared experts, nor biases
    assert {name for name, weight in source.items() if not torch.equal(result[name], weight)} == pruned
    assert all(torch.equal(result[name], source[name].where(result[name] != 0, 0)) for name in pruned)
    zeros = sum(int((result[name] == 0).sum()) for name in pruned)
    assert zeros == round(0.5 * sum(source[name].numel() for name in pruned))
    assert (folder / "config.json").read_bytes() == (run.folder / "config.json").read_bytes()


PRODUCTS = (torch.nn.functional.linear, torch.Tensor.matmul, torch.bmm)


class InputsOfLinears(TorchFunctionMode):
    """Record the inputs of every product with a weight, by the memory of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, list[torch.Tensor]] = defaultdict(list)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            inputs, weight = args[:2]
            pairs = zip(inputs, weight, strict=True) if weight.ndim == 3 else [(inputs, weight)]
            for states, of_expert in pairs:
                self.inputs[of_expert.data_ptr()].append(states.reshape(-1, states.shape[-1]))
        return function(*args, **(kwargs or {}))


def inputs_by_expert(run, name: str) -> list[torch.Tensor]:
    """Return the inputs that transformers routes to each expert for its slice of a fused weight, over the calibration.

    A token of another expert, multiplied by zero, is no input.
    """
    model = AutoModelForCausalLM.from_pretrained(run.folder, experts_implementation="eager").eval()
    with torch.no_grad(), InputsOfLinears() as mode:
        for window in run.input_ids("calibration"):
            model(input_ids=window[None])
    found = [mode.inputs[expert.data_ptr()] for expert in by_expert(model.get_parameter(name))]
    width = next(inputs.shape[1] for each in found for inputs in each)
    return [
        torch.cat([each[each.any(dim=1)] for each in every] or [torch.zeros(0, width)]) for every in found
    ]


def by_expert(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight of four experts with the experts first."""
    return weight.view(4, -1, weight.shape[-1])


SLICES = {  # fused weights of a layer, whether they are (in_features, out_features), and the module of the linears
    qwen3_moe: (
        "model.layers.1.mlp.experts.{}",
        {"gate_up_proj": False, "down_proj": False},
        {"mlp.experts"},
    ),
    llama4: (
        "model.layers.1.feed_forward.experts.{}",
        {"gate_up_proj": True, "down_proj": True},
        {"feed_forward.experts"},
    ),
    jetmoe: (
        "model.layers.1.{}_linear.weight",
        dict.fromkeys(
            [f"{block}.{side}put" for block in ("mlp", "self_attention.experts") for side in ("in", "out")],
            False,
        ),
        {"mlp.experts", "self_attention.experts"},
    ),
    dbrx: (
        "transformer.blocks.1.ffn.experts.mlp.{}",
        {"w1": False, "v1": False, "w2": True},
        {"ffn.experts"},
    ),
}


@pytest.mark.parametrize("family", SLICES)
def test_wanda_prunes_every_expert_by_the_tokens_that_reach_it(small_run, family):
    name_of, slices, modules = SLICES[family]
    run = small_run(family(), windows=ENOUGH)
    pruned, dense = run.exported_model(run.branch(0.0)[0]), run.transformers_model()
    counts = []
    for fused, transposed in slices.items():
        name = name_of.format(fused)
        before, after = by_expert(dense.get_parameter(name)), by_expert(pruned.get_parameter(name))
        every = inputs_by_expert(run, name)
        counts.append([len(inputs) for inputs in every])
        for old, new, inputs in zip(before, after, every, strict=True):
            assert len(inputs) > 64
            scores = (old.T if transposed else old).abs() * inputs.norm(dim=0)
            expected = scores.argsort(dim=1, stable=True).argsort(dim=1) < scores.shape[1] // 2
            assert torch.equal((new.T if transposed else new) == 0, expected)
    tokens = json.loads(run.store.read(run.capture(), "statistics/tokens-00001.json"))
    assert set(tokens) == modules
    assert {tuple(each) for each in tokens.values()} == {tuple(each) for each in counts}
    assert all(sum(each) == 2 * 40 * 12 for each in counts)


def test_sparsegpt_corrects_every_expert_by_the_tokens_that_reach_it(small_run):
    run = small_run(qwen3_moe(), windows=ENOUGH, pruner=SparseGPT())
    pruned, name = run.exported_model(run.branch(0.0)[0]), "model.layers.1.mlp.experts.gate_up_proj"
    dense = run.transformers_model().get_parameter(name).detach()
    for expert, inputs in enumerate(inputs_by_expert(run, name)):
        assert len(inputs) > 64
        prepared = SparseGPT().prepare(inputs.T @ inputs, len(inputs))
        gate_and_up = dense[expert].chunk(2)
        expected = torch.cat([SparseGPT().prune(one, prepared, one.numel() // 2) for one in gate_and_up])
        assert torch.allclose(pruned.get_parameter(name)[expert], expected, atol=1e-4)


def unreached(model: PreTrainedModel, expert: int) -> PreTrainedModel:
    """Return the model with a router that never chooses an expert."""
    for layer in model.model.layers[2:]:
        layer.mlp.gate.e_score_correction_bias[expert] = -100.0
    return model


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_an_expert_without_tokens_is_pruned_by_the_inputs_of_all_experts_of_its_layer(
    save_model, small_run, pruner
):
    torch.manual_seed(1)
    folder = save_model(unreached(deepseek_v3(initializer_range=0.3, n_group=1), expert=2))
    run = small_run(folder, windows=ENOUGH, **({"pruner": SparseGPT()} if pruner == "sparsegpt" else {}))
    exported = Path(run.store.location(run.export(run.branch(0.0)[0])))
    name = "model.layers.3.mlp.experts.down_proj"
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(each).get_parameter(name) for each in (run.folder, exported)
    )
    inputs = inputs_by_expert(run, name)
    assert [len(each) for each in inputs][2] == 0
    pooled = torch.cat(inputs)
    if pruner == "wanda":
        scores = dense[2].abs() * pooled.norm(dim=0)
        expected = dense[2].masked_fill(scores.argsort(dim=1, stable=True).argsort(dim=1) < 8, 0)
    else:
        prepared = SparseGPT().prepare(pooled.T @ pooled, len(pooled))
        expected = SparseGPT().prune(dense[2].detach(), prepared, dense[2].numel() // 2)
    assert torch.allclose(pruned[2], expected, atol=1e-4)
    tokens = [len(each) for each in inputs]
    few = [expert for expert, count in enumerate(tokens) if count < 64]
    (row,) = [
        row for row in json.loads((exported / "sparsity.json").read_text())["experts"] if row["layer"] == 3
    ]
    assert row == {"layer": 3, "experts": "mlp.experts", "tokens": tokens, "pruned_by_all": few}
    assert "3.mlp.experts.2" in (exported / "README.md").read_text()


def test_lanes_that_calibrate_themselves_are_exported_as_they_were_scored(small_run):
    run = small_run(gpt_oss(), calibration_mode="sequential")
    model = run.exported_model(run.branch(0.1)[0])
    losses = torch.tensor(run.losses(model, "test"))
    assert read_test(run.store, run.evaluate(0.0, 0.1)).best == pytest.approx(
        losses.mean().exp().item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "dies_in", "call"),
    [
        ({"pruner": SparseGPT()}, "lane_group.read_grams", 2),
        ({"recover": Refit()}, "lane_group.read_statistics", 2),
        ({"calibration_mode": "sequential"}, "lane_group.write_statistics", 4),
    ],
    ids=["sparsegpt", "refit", "sequential"],
)
def test_an_interrupted_search_over_experts_resumes_with_the_same_artifacts(
    small_run, another_store, dying_at, changes, dies_in, call
):
    run = small_run(qwen3_moe(), **changes)
    again = small_run(run.folder, another_store(), **changes)
    with dying_at("layerwise.tasks.capture.write_statistics", 2):
        again.capture(boundary_layers=1)
    assert again.capture(boundary_layers=1).content == run.capture().content
    if isinstance(changes.get("pruner"), SparseGPT):
        with dying_at("layerwise.tasks.capture_grams.write_grams", 2):
            again.grams(boundary_layers=1)
        assert again.grams(boundary_layers=1).content == run.grams().content
    with dying_at(f"layerwise.tasks.lanes.{dies_in}", call):
        again.branch(0.0, 0.1, boundary_layers=1)
    resumed, undisturbed = again.branch(0.0, 0.1, boundary_layers=1), run.branch(0.0, 0.1)
    assert [lane.artifact.content for lane in resumed] == [lane.artifact.content for lane in undisturbed]


def test_a_refit_changes_the_experts_that_enough_tokens_reach_and_lowers_the_error(small_run):
    run = small_run(gpt_oss(), windows=ENOUGH, recover=Refit())
    (plan,) = run.plans([0.0])
    recovered, *_ = recover.fn(run.store, run.inputs(), [plan], run.linears, run.pruning, Execution())
    outcomes = read_table(run.store, recovered, OUTCOMES_FILE).to_pylist()
    assert all(row["accepted"] and row["after"] < row["before"] for row in outcomes)
    one_shot = replace(run, pruning=run.pruning.one_shot)
    pruned = one_shot.exported_model(one_shot.branch(0.0)[0]).model.layers[0].mlp.experts
    weights = RecoveredLayers(run.store, plan, run.inputs(), run.pruning).existing(0)
    tokens = json.loads(run.store.read(run.capture(), "statistics/tokens-00000.json"))["mlp.experts"]
    assert sum(tokens) == 2 * 40 * 12
    for expert in (expert for expert, count in enumerate(tokens) if count > 150):
        for name in ("gate_up_proj", "down_proj"):
            before, after = getattr(pruned, name)[expert], weights[f"mlp.experts.{expert}.{name}"]
            assert torch.equal(before == 0, after == 0)
            assert not torch.equal(before, after)


def test_experts_in_fp8_are_dequantized_as_by_transformers(save_model, small_run):
    folder = save_model(deepseek_v3(initializer_range=0.2, dtype="bfloat16", intermediate_size=48).bfloat16())
    stored, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for name in linears_in(stored):
        weight = stored[name].float()
        blocks = weight.view(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
        scales = blocks.abs().amax((1, 3)) / 448
        quantized = (blocks / scales[:, None, :, None]).view(weight.shape)
        stored |= {name: quantized.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    fp8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    settings = FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16
    )
    check_dequantized(small_run(folder), expected)


def test_experts_in_mxfp4_are_dequantized_as_by_transformers(save_model, small_run):
    model = gpt_oss(initializer_range=0.2, intermediate_size=64, dtype="bfloat16").bfloat16()
    folder = save_model(model)
    stored, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        stored[f"{name}_blocks"] = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(121, 126, (experts, rows, columns // 32), dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": mxfp4}))
    settings = Mxfp4Config(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16
    )
    check_dequantized(small_run(folder), expected)


def check_dequantized(run, expected: PreTrainedModel) -> None:
    """Compare an import and its export with the dequantized model of transformers."""
    weights = whole_model(run.checkpoint, "bfloat16", Execution()).state_dict()
    for name, weight in expected.state_dict().items():
        experts, _, fused = name.rpartition(".")
        if fused == "gate_up_proj" and name not in weights and f"{experts}.0.gate_proj.weight" in weights:
            parts = [[f"{experts}.{e}.gate_proj.weight", f"{experts}.{e}.up_proj.weight"] for e in range(4)]
        elif name not in weights:
            leaf = f"{fused.removesuffix('_bias')}.{'bias' if fused.endswith('_bias') else 'weight'}"
            parts = [[f"{experts}.{expert}.{leaf}"] for expert in range(4)]
        else:
            parts = []
        found = (
            torch.stack([torch.cat([weights[one] for one in each]) for each in parts])
            if parts
            else weights[name]
        )
        assert torch.equal(found, weight), name
    exported = Path(run.store.location(run.export(run.branch(0.1)[0])))
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    opened = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(opened[name], weight.where(opened[name] != 0, 0)), name
    zeros = sum(int((opened[name] == 0).sum()) for name in opened)
    assert zeros >= round(0.5 * sum(linear.numel for layer in run.linears for linear in layer))


def test_a_unit_of_an_allocation_is_an_expert_with_all_of_its_linears():
    names = ["self_attn.q_proj", "mlp.experts.0.up_proj", "mlp.experts.0.down_proj", "mlp.experts.1.up_proj"]
    units = [(OTHER_LINEARS, [0]), ("mlp.experts.0", [1, 2]), ("mlp.experts.1", [3])]
    assert units_of(names, "expert") == units


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router():
    sizes = {"num_experts": 16, "shared_expert_intermediate_size": 16, "layer_types": ["full_attention"] * 3}
    model = build_outline(Qwen3NextConfig(**TEXT, **TOP_2, **sizes, head_dim=8))
    assert dense_linears(model) == [f"{layer}.mlp.shared_expert_gate" for layer in range(3)]


def test_linears_without_a_call_are_found_in_a_mixture_that_nobody_has_looked_at_before():
    layers = {"expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
    outline = build_outline(JambaConfig(**TEXT, **layers, num_experts=4))
    assert [(row["linear"], row["layers"]) for row in dense_rows(outline)] == [("mamba.dt_proj", [0, 2])]


def test_the_linears_of_experts_are_refitted_in_the_order_of_the_data_flow_if_some_are_excluded():
    expert = "mlp.experts.{}.{}_proj".format
    gate_and_up, downs = [expert(1, "gate"), expert(1, "up")], [[expert(0, "down")], [expert(1, "down")]]
    groups = [["self_attn.o_proj"], downs[0], gate_and_up, downs[1]]
    assert refitted_together(groups) == [[["self_attn.o_proj"]], [gate_and_up], downs]
