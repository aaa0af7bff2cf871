"""Whole model: a checkpoint opened in memory equals the model that transformers opens."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.models.whole_model import whole_model
from layerwise.tasks.running.execution import Execution

SHAPE = {"vocab_size": 97, "n_head": 4, "n_layer": 3}
NEOX = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}


# GPT-NeoX has different names for its head in files and in the model. GPT-2 does not use a padding token, so a padding
# token beyond the vocabulary, which was added to the tokenizer only, does no harm.
@pytest.fixture(params=["llama", "llama-tied", "gpt2", "gpt2-padding", "bloom", "gpt-neox"])
def folder(request, save_model, llama):
    models = {
        "llama": lambda: llama(num_hidden_layers=3),
        "llama-tied": lambda: llama(tie_word_embeddings=True),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_positions=64, **SHAPE)),
        "gpt2-padding": lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_positions=64, pad_token_id=97, **SHAPE)
        ),
        "gpt-neox": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(num_attention_heads=4, tie_word_embeddings=False, **NEOX)
        ),
        "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, **SHAPE)),
    }
    return save_model(models[request.param]())


def test_the_logits_agree_with_transformers(local_store, folder):
    model = whole_model(import_checkpoint(local_store, str(folder)), "float32", Execution())
    input_ids = torch.randint(97, (2, 12))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=input_ids).logits
    assert torch.equal(model(input_ids=input_ids).logits, expected)


def test_the_model_computes_in_the_requested_dtype(local_store, folder):
    model = whole_model(import_checkpoint(local_store, str(folder)), "bfloat16", Execution())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16
