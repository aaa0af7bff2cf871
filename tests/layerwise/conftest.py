"""Small random models of every family, and reference results computed by transformers."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
)
from transformers.pytorch_utils import Conv1D

from layerwise.models.experts import fused_tensors
from layerwise.models.streaming import StreamedModel
from layerwise.sparse import native
from layerwise.sparse.build import LIBRARY, SOURCES, NoKernel, compile_kernel
from layerwise.sparse.native import Kernel

VOCABULARY = 61
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODERN = TOKENS | SHAPE | HEADS | {"tie_word_embeddings": False}
OPT = TOKENS | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
GPT2 = TOKENS | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
FALCON = TOKENS | {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}

# Configuration, and the name of the list of decoder layers, taken from the model file of the family.
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict, str]] = {
    "llama": (LlamaConfig, MODERN, "model.layers"),
    "llama-tied": (LlamaConfig, MODERN | {"tie_word_embeddings": True}, "model.layers"),
    "mistral-window": (MistralConfig, MODERN | {"head_dim": 8, "sliding_window": 5}, "model.layers"),
    "qwen2": (Qwen2Config, MODERN, "model.layers"),
    "qwen3": (Qwen3Config, MODERN | {"head_dim": 16}, "model.layers"),
    "gemma": (GemmaConfig, MODERN | {"head_dim": 16, "tie_word_embeddings": True}, "model.layers"),
    "gemma2-window": (
        Gemma2Config,
        MODERN | {"head_dim": 16, "sliding_window": 5, "tie_word_embeddings": True},
        "model.layers",
    ),
    "gemma4": (  # a trained buffer in every layer; the last layer has full attention and wider heads
        Gemma4TextConfig,
        MODERN
        | {"hidden_size_per_layer_input": 0, "head_dim": 8, "global_head_dim": 16, "sliding_window": 5},
        "model.layers",
    ),
    "gemma4-small": (  # embeddings of the tokens for every layer, and two layers that use keys and values of earlier ones
        Gemma4TextConfig,
        MODERN
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "num_kv_shared_layers": 2}
        | {"head_dim": 8, "global_head_dim": 16, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        "model.layers",
    ),
    "gemma3n": (  # as gemma4-small, with hidden states of shape (4, windows, seqlen, hidden_size)
        Gemma3nTextConfig,
        MODERN
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "num_kv_shared_layers": 2}
        | {"head_dim": 8, "sliding_window": 5, "laurel_rank": 8, "intermediate_size": [48] * 4}
        | {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        "model.layers",
    ),
    "recurrent-gemma": (  # two layers with a recurrent block, one with attention
        RecurrentGemmaConfig,
        MODERN | {"lru_width": 32, "head_dim": 8, "attention_window_size": 5},
        "model.layers",
    ),
    "bamba": (  # recurrent layers and attention; every layer returns a pair
        BambaConfig,
        MODERN
        | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
        | {"attn_layer_indices": [1, 3]},
        "model.layers",
    ),
    "phi3": (Phi3Config, MODERN, "model.layers"),
    "opt": (OPTConfig, OPT | {"word_embed_proj_dim": 32}, "model.decoder.layers"),
    "opt-projected": (  # as OPT-350m
        OPTConfig,
        OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "model.decoder.layers",
    ),
    "gpt-neox": (GPTNeoXConfig, TOKENS | SHAPE | {"num_attention_heads": 4}, "gpt_neox.layers"),
    "gpt-neo": (
        GPTNeoConfig,
        TOKENS
        | {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 2]], "window_size": 5},
        "transformer.h",
    ),
    "gpt2": (GPT2Config, GPT2, "transformer.h"),
    "falcon": (FalconConfig, FALCON | {"alibi": False}, "transformer.h"),
    "falcon-alibi": (FalconConfig, FALCON | {"alibi": True, "multi_query": False}, "transformer.h"),
    "bloom": (BloomConfig, TOKENS | {"hidden_size": 32, "n_layer": 4, "n_head": 4}, "transformer.h"),
}
MIXTURES: dict[str, tuple[type[PretrainedConfig], dict, str]] = {
    "qwen3-moe": (
        Qwen3MoeConfig,
        MODERN | {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "model.layers",
    ),
    "gpt-oss": (
        GptOssConfig,
        MODERN | {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 16},
        "model.layers",
    ),
}


@dataclass(frozen=True)
class TinyModel:
    """A transformers model with random weights, and the same weights as in a checkpoint."""

    reference: PreTrainedModel
    layers_name: str
    checkpoint: dict[str, Tensor]

    @property
    def num_layers(self) -> int:
        return len(self.reference.get_submodule(self.layers_name))

    def outer(self) -> dict[str, Tensor]:
        """Weights outside the decoder layers, by name."""
        return {
            name: weight.clone()
            for name, weight in self.checkpoint.items()
            if not name.startswith(f"{self.layers_name}.")
        }

    def layers(self, first: int = 0) -> list[dict[str, Tensor]]:
        """Return copies of the weights of layer ``first`` and the following layers, by name within the layer.

        Those of experts one by one.
        """
        fused, found = fused_tensors(self.reference), []
        for index in range(first, self.num_layers):
            prefix = f"{self.layers_name}.{index}."
            layer: dict[str, Tensor] = {}
            for name, weight in self.checkpoint.items():
                if name.startswith(prefix):
                    parts = fused[name].split(name, weight) if name in fused else {name: weight}
                    layer |= {part.removeprefix(prefix): each.clone() for part, each in parts.items()}
            found.append(layer)
        return found

    def streamed(self, dtype: torch.dtype = torch.float32) -> StreamedModel:
        config = deepcopy(self.reference.config)
        return StreamedModel(config, self.outer(), dtype, torch.device("cpu"))

    def cast(self, dtype: torch.dtype) -> PreTrainedModel:
        """Return the reference with parameters in ``dtype`` and unchanged buffers, like ``from_pretrained``."""
        model = deepcopy(self.reference)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model


@pytest.fixture
def tiny_model() -> Callable[..., TinyModel]:
    """Build a model of one of the FAMILIES or MIXTURES; keywords go to its configuration."""

    def build(family: str = "llama", **settings) -> TinyModel:
        config_class, defaults, layers_name = (FAMILIES | MIXTURES)[family]
        config = config_class(**(defaults | settings))
        generator = torch.Generator().manual_seed(0)
        reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for parameter in reference.parameters():
            # Far from the initial values, so that every weight, norm and bias affects the result.
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        state = {name: tensor for name, tensor in reference.state_dict().items() if name not in tied}
        for name in state.keys() - dict(reference.named_parameters()).keys():
            state[name].mul_(0.75)  # trained buffers as well
        checkpoint = {name: tensor.clone() for name, tensor in state.items()}
        return TinyModel(reference, layers_name, checkpoint)

    return build


@pytest.fixture
def random_windows_of() -> Callable[..., Tensor]:
    """Return random token ids, shape ``(windows, seqlen)``."""

    def draw(windows: int, seqlen: int = 16, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (windows, seqlen), generator=generator)

    return draw


@pytest.fixture
def published_wanda_mask() -> Callable[[Tensor, list[Tensor], float], Tensor]:
    """Return Wanda's mask by its definition in arXiv:2306.11695, written independently of ``layerwise``."""

    def mask_of(weight: Tensor, sequences: list[Tensor], sparsity: float) -> Tensor:
        """Return the mask of ``weight`` (out_features, in_features) for inputs of sequences (tokens, in_features).

        As in the official implementation, the squared norm of each input channel is averaged over the sequences one by
        one, and the lowest scores of every row are removed.
        """
        mean = torch.zeros(weight.shape[1])
        for number, tokens in enumerate(sequences):
            mean = mean * (number / (number + 1)) + tokens.float().norm(p=2, dim=0) ** 2 / (number + 1)
        metric = weight.float().abs() * mean.sqrt()
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        for row in range(len(weight)):
            ascending = torch.sort(metric[row], stable=True).indices
            mask[row, ascending[: int(weight.shape[1] * sparsity)]] = True
        return mask

    return mask_of


@pytest.fixture
def linear_inputs() -> Callable[[PreTrainedModel, str, Tensor], dict[str, list[Tensor]]]:
    """Return the inputs of the linears of one layer of a transformers model, by name: one tensor per sequence."""

    def run(model: PreTrainedModel, layer_name: str, input_ids: Tensor) -> dict[str, list[Tensor]]:
        layer, inputs, hooks = model.get_submodule(layer_name), {}, []
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                inputs[name] = []
                hooks.append(module.register_forward_pre_hook(_remembering(inputs[name])))
        with torch.no_grad():
            for sequence in input_ids:
                model(input_ids=sequence[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        return inputs

    return run


def _remembering(kept: list[Tensor]) -> Callable:
    def remember(_module, inputs: tuple[Tensor]) -> None:
        kept.append(inputs[0].reshape(-1, inputs[0].shape[-1]).clone())  # OPT's are flat already

    return remember


@pytest.fixture
def two_windows_at_a_time(monkeypatch) -> None:
    """Set batches to two windows of 16 tokens, so that five windows leave a remainder."""
    monkeypatch.setattr("layerwise.models.hidden_states.TOKENS_PER_FORWARD", 32)


@pytest.fixture
def layer_outputs() -> Callable[[PreTrainedModel, str, Tensor], list[Tensor]]:
    """Return the outputs of the decoder layers of a transformers model, one tensor per layer."""

    def run(model: PreTrainedModel, layers_name: str, input_ids: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []

        def remember(_module, _inputs, output) -> None:
            outputs.append((output if isinstance(output, Tensor) else output[0]).clone())

        hooks = [layer.register_forward_hook(remember) for layer in model.get_submodule(layers_name)]
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return outputs

    return run


@pytest.fixture(scope="session")
def library_path(tmp_path_factory) -> Path:
    """Return a copy of the installed kernel if it is newer than its source; otherwise compile it."""
    path = tmp_path_factory.mktemp("kernel") / "kernel.so"
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > max(source.stat().st_mtime for source in SOURCES):
        shutil.copy(LIBRARY, path)
        return path
    try:
        compile_kernel(path)
    except NoKernel as reason:
        pytest.skip(str(reason))
    return path


@pytest.fixture
def best_kernel(library_path, monkeypatch) -> Kernel:
    """Make linears and ``accelerate`` use the kernel at the highest level of this CPU."""
    monkeypatch.setattr(native, "LIBRARY", library_path)
    native.kernel.cache_clear()
    found = native.kernel()
    assert found is not None
    yield found
    native.kernel.cache_clear()


@pytest.fixture
def no_kernel(tmp_path, monkeypatch) -> None:
    """Make the kernel unavailable, as on a machine without a compiler."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "kernel.so")
    native.kernel.cache_clear()
    yield
    native.kernel.cache_clear()
