"""Acceleration of models by packed linears."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config

from layerwise.sparse.accelerate import LEAST_SPARSITY, accelerate
from layerwise.sparse.bitmask import pack
from layerwise.sparse.bitmask_linear import BitmaskLinear
from tests.layerwise.sparse.shapes import DTYPES

TOKENS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
CONFIGS = {
    "llama": LlamaConfig(**TOKENS, **WIDE, **HEADS),
    "qwen2": Qwen2Config(**TOKENS, **WIDE, **HEADS, tie_word_embeddings=True),  # biases, tied head
    "gpt2": GPT2Config(**TOKENS, n_embd=512, n_layer=2, n_head=8, n_positions=64),  # Conv1D
}
IN_A_LAYER = {"llama": 7, "qwen2": 7, "gpt2": 4}


def pruned_model(family: str, dtype: torch.dtype = torch.float32, sparsity: float = 0.7) -> PreTrainedModel:
    """Return a random model whose linears were pruned by multiplication with a mask, which leaves -0.0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".layers." in name or ".h." in name and parameter.ndim == 2:
                parameter.mul_(torch.rand(parameter.shape) >= sparsity)
    return model


@pytest.mark.usefixtures("best_kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_an_accelerated_model_computes_the_same(family, dtype):
    model, accelerated = pruned_model(family, dtype), pruned_model(family, dtype)
    done = accelerate(accelerated)
    assert len(done.sparse) == 2 * IN_A_LAYER[family]
    assert list(done.dense) == ["lm_head"]
    assert all(linear.sparsity == pytest.approx(0.7, abs=0.01) for linear in done.sparse)
    for shape in ((1, 5), (3, 20)):  # the kernel, and dense blocks
        tokens = torch.randint(3, 61, shape)
        expected, logits = model(tokens).logits, accelerated(tokens).logits
        error = (logits - expected).norm() / expected.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.usefixtures("best_kernel")
@pytest.mark.parametrize("family", CONFIGS)
def test_an_accelerated_model_generates_the_same_text_in_batches_with_padding_and_a_cache(family):
    model, accelerated = pruned_model(family), pruned_model(family)
    accelerate(accelerated)
    prompts = torch.randint(3, 61, (3, 9))
    mask = torch.ones_like(prompts)
    prompts[1, :4], mask[1, :4] = 0, 0
    for num_beams in (1, 2):
        texts = [
            each.generate(
                prompts, attention_mask=mask, max_new_tokens=12, do_sample=False, num_beams=num_beams
            )
            for each in (model, accelerated)
        ]
        assert torch.equal(*texts)


@pytest.mark.usefixtures("best_kernel")
def test_a_saved_model_is_the_checkpoint_it_came_from(tmp_path):
    for family in CONFIGS:
        model, accelerated = pruned_model(family), pruned_model(family)
        accelerate(accelerated)
        accelerated.save_pretrained(tmp_path / family)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("best_kernel")
def test_linears_that_stay_dense_are_reported_with_the_reason(best_kernel):
    least = LEAST_SPARSITY[best_kernel.level]
    linears = {
        "sparse": nn.Linear(512, 512),
        "dense": nn.Linear(512, 512),
        "small": nn.Linear(8, 8),
        "in_half": nn.Linear(512, 512).half(),
        "special": type("Special", (nn.Linear,), {})(512, 512),
        "tied": nn.Linear(512, 512),
        "tied_too": nn.Linear(512, 512),
    }
    model = nn.ModuleDict(linears)
    model["tied_too"].weight = model["tied"].weight
    with torch.no_grad():
        for name, linear in linears.items():
            if name != "dense":
                linear.weight[torch.rand(linear.weight.shape) < least + 0.05] = 0
    done = accelerate(model)
    assert [linear.name for linear in done.sparse] == ["sparse"]
    assert isinstance(model["sparse"], BitmaskLinear)
    assert dict(done.dense) == {
        "dense": f"sparsity below {least:g}",
        "small": "fewer than 65536 weights",
        "in_half": "its weights are float16, not bfloat16 or float32",
        "special": "a Special may compute more than a product",
        "tied": "another module uses the same weight",
        "tied_too": "another module uses the same weight",
    }
    assert str(done).startswith(f"1 of 7 linears run sparse ({best_kernel.level}): 1 MB of weights are ")
    assert "2 stay dense: another module uses the same weight" in str(done)


@pytest.mark.usefixtures("best_kernel")
def test_zeros_with_a_sign_are_not_stored():
    model = nn.ModuleDict({"linear": nn.Linear(512, 512, bias=False)})
    with torch.no_grad():
        model["linear"].weight.copy_(-torch.ones(512, 512)).mul_(torch.arange(512) % 4 == 0)
    (linear,) = accelerate(model).sparse
    assert linear.sparsity == 0.75
    assert model["linear"].panels.values.numel() == 512 * 128


@pytest.mark.usefixtures("best_kernel")
def test_int8_is_smaller_and_almost_as_accurate():
    model, accelerated, in_steps = (pruned_model("llama", torch.bfloat16) for _ in range(3))
    bytes_of = [
        sum(each.sparse_bytes for each in accelerate(m, int8).sparse)
        for m, int8 in ((accelerated, False), (in_steps, True))
    ]
    assert bytes_of[1] < 0.62 * bytes_of[0]
    tokens = torch.randint(3, 61, (1, 8))
    expected = model(tokens).logits.float()
    assert (in_steps(tokens).logits - expected).norm() / expected.norm() < 0.05


@pytest.mark.usefixtures("best_kernel")
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_weights_replace_those_on_the_meta_device(family):
    model, skeleton = pruned_model(family, torch.bfloat16), pruned_model(family, torch.bfloat16)
    packed = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj", "c_attn")):
            weight = module.weight.detach()
            packed[f"{name}.weight"] = pack(weight.T if family == "gpt2" else weight)
            skeleton.get_submodule(name).weight = nn.Parameter(module.weight.to("meta"))
    accelerate(skeleton, packed=packed)
    tokens = torch.randint(3, 61, (1, 8))
    expected = model(tokens).logits
    assert (skeleton(tokens).logits - expected).norm() / expected.norm() < 1e-2


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_a_kernel_all_linears_stay_dense_and_packed_weights_are_unpacked(family):
    model, other = pruned_model(family), pruned_model(family)
    packed = {}
    for name, module in other.named_modules():
        if name.endswith(("q_proj", "c_attn")):
            weight = module.weight.detach()
            packed[f"{name}.weight"] = pack(weight.T if family == "gpt2" else weight)
            module.weight = nn.Parameter(module.weight.to("meta"))
    done = accelerate(other, packed=packed)
    assert not done.sparse
    assert set(done.dense.values()) == {"the sparse kernel was not built"}
    tokens = torch.randint(3, 61, (1, 8))
    assert torch.equal(model(tokens).logits, other(tokens).logits)


@pytest.mark.usefixtures("best_kernel")
def test_a_model_that_is_not_on_the_cpu_is_refused_and_left_unchanged():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 512))
    with pytest.raises(ValueError, match="0.weight is on the device meta"):
        accelerate(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.usefixtures("best_kernel")
def test_packed_weights_of_another_model_are_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="1.weight has shape .* but the model has no such linear"):
        accelerate(model, packed={"1.weight": pack(torch.eye(2))})
    with pytest.raises(ValueError, match=r"shape \(2, 2\), but the model has shape \(2, 3\) for it"):
        accelerate(model, packed={"0.weight": pack(torch.eye(2))})
