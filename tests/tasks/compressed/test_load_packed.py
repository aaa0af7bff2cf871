"""Compressed checkpoints whose weights stay packed when they are loaded."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from layerwise.sparse import accelerate as accelerate_module
from layerwise.sparse.bitmask_linear import BitmaskLinear
from layerwise.sparse.native import kernel
from layerwise.tasks.compress import compress, require_compressible
from layerwise.tasks.compressed.checkpoint import load, load_packed
from layerwise.tasks.running.execution import Execution
from tests.lm_task_files import give_words
from tests.tasks.test_compress import CARD, GPT2

SOURCES = ["LLaMA", "tied, bfloat16", "GPT-2", "GPT-2 without its head"]


@pytest.fixture(params=SOURCES)
def folder(request, llama, small_run) -> str:
    """The compressed checkpoint of a small model, pruned to 70 %."""
    match request.param:
        case "LLaMA":
            model = None
        case "tied, bfloat16":
            model = llama(num_hidden_layers=3, tie_word_embeddings=True).to(torch.bfloat16)
        case "GPT-2":
            model = GPT2LMHeadModel(GPT2Config(**GPT2))
        case _:
            model = GPT2Model(GPT2Config(**GPT2))
    run = small_run(model, target=0.7)
    exported = run.export(run.branch(0.0)[0])
    return run.store.location(compress.fn(run.store, exported, CARD, Execution()))


@pytest.fixture
def any_size_gains(monkeypatch) -> None:
    """Pack linears of the small sizes of this test too."""
    if kernel() is None:
        pytest.skip("the sparse kernel was not built")
    monkeypatch.setattr(accelerate_module, "LEAST_WEIGHTS", 1)


@pytest.mark.usefixtures("any_size_gains")
def test_the_packed_model_is_the_dense_one(folder):
    model, (packed, done) = load(folder), load_packed(folder)
    linears = {name for name, module in packed.named_modules() if isinstance(module, BitmaskLinear)}
    assert linears == {linear.name for linear in done.sparse}
    assert len(linears) == 3 * (4 if model.config.model_type == "gpt2" else 7)
    assert set(done.dense) == {"lm_head"}
    tokens = torch.randint(97, (2, 7))
    expected, found = model(tokens).logits.float(), packed(tokens).logits.float()
    assert found.dtype == expected.dtype
    assert (found - expected).norm() < (1e-2 if model.dtype == torch.bfloat16 else 1e-5) * expected.norm()
    assert packed.dtype == model.dtype
    texts = [each.generate(tokens, max_new_tokens=5, do_sample=False) for each in (model, packed)]
    assert torch.equal(*texts)


@pytest.mark.usefixtures("any_size_gains")
def test_experts_that_are_stored_one_by_one_are_packed_one_by_one(small_run):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    run = small_run(MixtralForCausalLM(MixtralConfig(**shape, **heads)), target=0.7)
    require_compressible(run.checkpoint)
    exported = run.export(run.branch(0.0)[0])
    folder = run.store.location(compress.fn(run.store, exported, CARD, Execution()))
    expected, loaded = AutoModelForCausalLM.from_pretrained(run.store.location(exported)), load(folder)
    weights = loaded.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in expected.state_dict().items())
    packed, done = load_packed(folder)
    assert len(done.sparse) == 3 * (4 + 3 * 3)
    assert {name.rpartition(".")[2] for name in done.dense} == {"lm_head"}
    tokens = torch.randint(97, (2, 7))
    assert torch.allclose(packed(tokens).logits, expected.eval()(tokens).logits, atol=1e-4)


def test_experts_that_are_stored_in_one_tensor_are_refused(small_run):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
    run = small_run(GptOssForCausalLM(GptOssConfig(**shape, num_attention_heads=4, num_local_experts=3)))
    with pytest.raises(
        ValueError, match=r"experts\.\w+ holds a weight of all experts of a layer\): such a model"
    ):
        require_compressible(run.checkpoint)


@pytest.mark.usefixtures("any_size_gains")
def test_int8_is_close_to_the_dense_model(folder):
    model, (packed, _) = load(folder), load_packed(folder, int8=True)
    tokens = torch.randint(97, (1, 7))
    expected, found = model(tokens).logits.float(), packed(tokens).logits.float()
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


def test_linears_that_would_not_become_faster_stay_dense_with_the_same_weights(folder):
    model, (packed, done) = load(folder), load_packed(folder)
    assert not done.sparse
    weights = packed.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.usefixtures("any_size_gains")
def test_lm_eval_runs_on_packed_weights(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(give_words(tmp_path))
    requests = [
        Instance("loglikelihood", {}, (question, f" {answer}"), 0)
        for question, answer in (("redfox", "bluecar"), ("red green bluetree", "greencar redfox"))
    ]
    packed, done = load_packed(folder)
    assert done.sparse
    dense_answers, packed_answers = (
        HFLM(model, tokenizer=tokenizer).loglikelihood(requests) for model in (load(folder), packed)
    )
    for (expected, _), (found, _) in zip(dense_answers, packed_answers, strict=True):
        assert found == pytest.approx(expected, rel=1e-2 if packed.dtype == torch.bfloat16 else 1e-5)
