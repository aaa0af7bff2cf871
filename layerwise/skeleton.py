"""The shape of a model without its weights: where its decoder layers are, and what can be pruned in them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:  # takes two seconds: whoever only validates settings does not wait for it
    from transformers import PreTrainedModel

# Number of experts under the names that transformers' configurations use for it.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


class UnsupportedModel(ValueError):
    """The model cannot be streamed layer by layer; the message names it and says why."""


@dataclass(frozen=True)
class Linear:
    """One prunable weight of a decoder layer, seen as ``(out_features, in_features)``."""

    name: str  # relative to the layer, e.g. "self_attn.q_proj"
    out_features: int
    in_features: int
    transposed: bool  # stored as (in_features, out_features): GPT-2's Conv1D

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    def oriented(self, weight: Tensor) -> Tensor:
        """A view of the stored ``weight`` as ``(out_features, in_features)``; its own inverse."""
        return weight.T if self.transposed else weight


def check_supported(config: PretrainedConfig) -> None:
    """Refuse what cannot be pruned layer by layer before anything is built.

    Raises:
        UnsupportedModel: an encoder-decoder, or a mixture of experts.
    """
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{config.model_type} is an encoder-decoder; layerwise prunes decoder-only language models. "
            "Use a causal language model such as LLaMA, Mistral, Qwen or GPT-2."
        )
    text_config = config.get_text_config()
    for name in EXPERT_COUNTS:
        if (count := getattr(text_config, name, None)) and count > 1:
            raise UnsupportedModel(
                f"{config.model_type} is a mixture of experts ({name} = {count}); experts that see few calibration "
                "tokens need their own treatment, which layerwise does not have. Use a dense model."
            )


def build_skeleton(config: PretrainedConfig) -> "PreTrainedModel":
    """The model of ``config`` with every parameter on the meta device and every buffer computed for real.

    Raises:
        UnsupportedModel: see ``check_supported``; also if transformers has no causal language model for it.
    """
    check_supported(config)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise UnsupportedModel(
            f"transformers has no causal language model for {config.model_type!r} ({error}). "
            "Models that bring their own code are not run; use one that transformers knows."
        ) from error
    layer_prefix(model)  # refuses a model without a list of decoder layers
    return model.eval()


def layer_prefix(model: "PreTrainedModel") -> str:
    """Name of the list of decoder layers, e.g. ``model.layers``.

    Raises:
        UnsupportedModel: not exactly one module list has ``num_hidden_layers`` entries of one class.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and len({type(m) for m in module}) == 1
    ]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise UnsupportedModel(
            f"{model.config.model_type} has {len(outermost)} module lists of {num_layers} decoder layers "
            f"({', '.join(outermost) or 'none'}); exactly one is needed to stream it layer by layer."
        )
    return outermost[0]


def expected_tensors(model: "PreTrainedModel") -> dict[str, tuple[int, ...]]:
    """State-dict name and shape of every tensor that a checkpoint must hold; tied ones are left out."""
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def linears_of(layer: nn.Module) -> tuple[Linear, ...]:
    """The linears of one decoder layer, in the order of the module tree."""
    found = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            found.append(Linear(name, module.out_features, module.in_features, transposed=False))
        elif isinstance(module, Conv1D):
            found.append(Linear(name, module.nf, module.nx, transposed=True))
    return tuple(found)


def require_positions(model: "PreTrainedModel", seqlen: int) -> None:
    """Refuse windows longer than a model's table of learned positions (GPT-2, OPT); rotary ones have no end.

    Raises:
        ValueError: ``seqlen`` tokens do not fit.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if known is None or seqlen <= known:
        return
    # A table may have a few rows more than positions: OPT's first two are for padding.
    tables = [
        m for m in model.modules() if isinstance(m, nn.Embedding) and 0 <= m.num_embeddings - known <= 8
    ]
    if any(table is not model.get_input_embeddings() for table in tables):
        raise ValueError(
            f"{model.config.model_type} has learned {known} positions, and a window has {seqlen} tokens. "
            f"Set the window's length (--seqlen) to {known} or less."
        )
