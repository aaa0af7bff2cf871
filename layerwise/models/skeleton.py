"""Skeleton of a model: its modules without their weights, its decoder layers, and the linears in them."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerwise.models.experts import EXPERT_COUNTS, has_experts, separate_experts, unknown_experts

if TYPE_CHECKING:  # takes seconds: too long for a command that only validates settings
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

OTHER_TOWERS = (
    "vision",
    "audio",
    "speech",
    "vq_",
)  # parts of the names of configurations within a configuration
PLAIN = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)  # parameters of a function, not *args
# Entries of a configuration that change the output of a forward pass, with the values that streaming needs.
PLAIN_FORWARD = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}


class UnsupportedModel(ValueError):
    """The model cannot be streamed layer by layer; the message gives the model type and the reason."""


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
        """Return a view of the stored ``weight`` as ``(out_features, in_features)``; the function is its own inverse."""
        return weight.T if self.transposed else weight


def check_supported(config: PretrainedConfig) -> None:
    """Raise if a model cannot be pruned layer by layer, judged by its configuration.

    Raises:
        UnsupportedModel: the model is an encoder or an encoder-decoder, or transformers has no language model for it.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )

    try:
        text_config = config.get_text_config()
    except ValueError as error:  # one for text that is read, and one for what is written, e.g. music
        raise UnsupportedModel(
            f"{config.model_type} is made of several models for text ({', '.join(sorted(config.sub_configs))}); layerwise "
            "prunes one decoder-only language model. Use a language model."
        ) from error
    if config.is_encoder_decoder or text_config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{config.model_type} is an encoder-decoder; layerwise prunes decoder-only language models. "
            "Use a causal language model such as LLaMA, Mistral, Qwen or GPT-2."
        )
    if is_multimodal(config):
        if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
            raise UnsupportedModel(
                f"transformers has no model for {config.model_type!r} that takes text and returns text "
                f"({', '.join(_towers(config))}), so there is no language model to prune. Use a language model."
            )
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"transformers has no causal language model for {config.model_type!r}, and layerwise does not run code "
            "that comes with a model. Use a model that transformers supports."
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        raise UnsupportedModel(
            f"{config.model_type} is an encoder (tokens attend to later tokens); layerwise prunes causal language "
            'models. If this model was trained as a decoder, set "is_decoder": true in its config.json.'
        )


def build_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of ``config`` with every parameter on the meta device and every buffer computed.

    Experts have linears of their own, see ``experts.separate_experts``.

    Raises:
        UnsupportedModel: see ``check_supported``, ``layer_prefix`` and ``require_known_experts``.
    """
    from accelerate import init_empty_weights

    check_supported(config)
    with init_empty_weights(include_buffers=False):
        model = _model_of(config)
    require_known_experts(model)
    separate_experts(model, layer_prefix(model))
    return model.eval()


def build_outline(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of ``config`` with everything on the meta device: names and shapes, without memory for data.

    The weights of experts are fused, as in transformers.

    Raises:
        UnsupportedModel: as for ``build_skeleton``.
    """
    check_supported(config)
    with torch.device("meta"):
        model = _model_of(config)
    require_known_experts(model)
    return model.eval()


def require_known_experts(model: PreTrainedModel) -> None:
    """Raise if a mixture of experts computes its experts in a way that is not known.

    Raises:
        UnsupportedModel: the experts cannot be pruned; or see ``layer_prefix``.
    """
    prefix = layer_prefix(model)
    config = model.config.get_text_config()
    counts = {name: getattr(config, name, None) for name in EXPERT_COUNTS}
    several = [f"{name} = {count}" for name, count in counts.items() if isinstance(count, int) and count > 1]
    unknown = unknown_experts(model, prefix)
    # Doge counts experts, but has them only with is_moe.
    is_mixture = bool(several) and getattr(config, "is_moe", True)
    if unknown is None and is_mixture and not has_experts(model, prefix):
        unknown = prefix
    if unknown is not None:
        raise UnsupportedModel(
            f"{model.config.model_type} is a mixture of experts ({', '.join(several) or 'experts'}) whose layers compute their "
            f"experts in a way of their own ({unknown}), so the experts cannot be pruned one by one. Use another model, "
            "such as Mixtral, Qwen3-MoE, DeepSeek-V3 or gpt-oss."
        )


def _model_of(config: PretrainedConfig) -> PreTrainedModel:
    """Build the language model of ``config``; if it is multimodal, the whole model.

    Only the class of the whole model computes positions, masks and embeddings of text exactly as it does.

    Raises:
        UnsupportedModel: the model does not run on tokens alone.
    """
    import transformers

    model: PreTrainedModel = getattr(transformers, auto_class(config)).from_config(
        config, dtype=torch.float32
    )
    parameters = signature(model.forward).parameters.values()
    needed = [each.name for each in parameters if each.default is each.empty and each.kind in PLAIN]
    if others := [name for name in needed if name != "input_ids"]:
        raise UnsupportedModel(
            f"{config.model_type} needs more than tokens ({', '.join(others)}), so its language model cannot be run on "
            "text alone. Use another model."
        )
    return model


def auto_class(config: PretrainedConfig) -> str:
    """Return the name of the class of transformers that loads the whole model."""
    return "AutoModelForMultimodalLM" if is_multimodal(config) else "AutoModelForCausalLM"


def is_multimodal(config: PretrainedConfig) -> bool:
    """Return whether the model of ``config`` has parts for images or sound besides its language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    only_multimodal = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return bool(_towers(config)) or only_multimodal


def _towers(config: PretrainedConfig) -> list[str]:
    return [name for name in config.sub_configs if any(word in name for word in OTHER_TOWERS)]


def with_plain_forward(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of ``config`` whose model returns a named output without hidden states and attentions."""
    plain = deepcopy(config)
    for part in {id(each): each for each in (plain, plain.get_text_config())}.values():
        for name, value in PLAIN_FORWARD.items():
            setattr(part, name, value)
    return plain


def layer_prefix(model: PreTrainedModel) -> str:
    """Return the name of the list of decoder layers, e.g. ``model.layers``.

    Raises:
        UnsupportedModel: the model does not have exactly one list of ``num_hidden_layers`` modules.
    """
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if num_layers is None:
        raise UnsupportedModel(
            f"the configuration of {model.config.model_type} has no number of decoder layers (num_hidden_layers), because "
            "the model consists of several stacks of layers; streaming layer by layer needs exactly one. Use another model."
        )
    root = _language_model(model)
    start, encoders = f"{root}." if root else "", _encoders(model)
    lists = {
        start + name: {type(each) for each in module}
        for name, module in model.get_submodule(root).named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and not f"{start}{name}".startswith(encoders)
    }
    # Hybrids may have a class for every kind of layer.
    found = [name for name, classes in lists.items() if len(classes) == 1] or list(lists)
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise UnsupportedModel(
            f"{model.config.model_type} has {len(outermost)} module lists of {num_layers} decoder layers "
            f"({', '.join(outermost) or 'none'}); streaming layer by layer needs exactly one. Use another model."
        )
    return outermost[0]


def _encoders(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the beginnings of the names of the modules in models with a configuration of their own, e.g. for images."""
    from transformers import PreTrainedModel

    if not is_multimodal(model.config):
        return ()
    of_text = {type(model.config), type(model.config.get_text_config())}
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) not in of_text
    )


def _language_model(model: PreTrainedModel) -> str:
    """Return the name of the module that holds the decoder layers of a multimodal model; empty for other models."""
    if not is_multimodal(model.config):
        return ""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def expected_tensors(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return state-dict name and shape of every tensor that a checkpoint must contain, without tied tensors.

    In a multimodal model these are the tensors of the language model and of its head. The others are never computed
    with: text does not need them.
    """
    tied, of_text = set(model.all_tied_weights_keys), text_modules(model)
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in tied and name.startswith(of_text)
    }


def weights_of_several_layers(model: PreTrainedModel) -> dict[str, str]:
    """Map the weights that decoder layers share to the one that a checkpoint contains, by state-dict name.

    That one is mapped to itself.
    """
    inside = f"{layer_prefix(model)}."
    tied = {
        name: source
        for name, source in model.all_tied_weights_keys.items()
        if name.startswith(inside) and source.startswith(inside)
    }
    return tied | {source: source for source in tied.values()}


def text_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the beginnings of the names of all modules and tensors that text needs, each with a dot at its end.

    In a multimodal model these are the language model and its head; in other models, everything.
    """
    if not (language_model := _language_model(model)):
        return ("",)
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if head is not None and module is head]
    return tuple(f"{name}." for name in (language_model, *heads))


def fill_unused_parts(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Give the parameters of a multimodal model that text does not need a place on ``device``, without memory.

    Some models move inputs to the device of their first parameter. The values are NaN, so that a result that does depend
    on them is noticed.
    """
    used = {*expected_tensors(model), *model.all_tied_weights_keys}
    nan = torch.full((), torch.nan, dtype=dtype, device=device)
    for name, parameter in model.named_parameters():
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            filled = nn.Parameter(nan.expand(parameter.shape), requires_grad=False)
            model.get_submodule(owner)._parameters[leaf] = filled


def linears_of(layer: nn.Module) -> tuple[Linear, ...]:
    """Return the linears of one decoder layer, in the order of the module tree."""
    from transformers.pytorch_utils import Conv1D

    found = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            found.append(Linear(name, module.out_features, module.in_features, transposed=False))
        elif isinstance(module, Conv1D):
            found.append(Linear(name, module.nf, module.nx, transposed=True))
    return tuple(found)


def positions_of(config: PretrainedConfig) -> int | None:
    """Return the number of positions of a model, its context; None if its configuration has no limit."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((number for number in found if isinstance(number, int)), None)


def require_positions(model: PreTrainedModel, seqlen: int) -> None:
    """Raise if windows are longer than a model's table of positions (GPT-2, OPT); warn if rotary positions end earlier.

    The warning is logged once per process for each model type and length.

    Raises:
        ValueError: the table has fewer than ``seqlen`` positions.
    """
    config = model.config.get_text_config()
    known = positions_of(config)
    # MPT, whose number of positions has another name, computes its ALiBi for exactly these.
    has_table = getattr(config, "max_position_embeddings", None) is None
    if known is None or seqlen <= known:
        return
    of_text = text_modules(model)  # an image encoder has a table of positions of its own
    # A table may have a few more rows than positions: OPT's first two are for padding.
    learned = any(
        isinstance(module, nn.Embedding)
        and 0 <= module.num_embeddings - known <= 8
        and module is not model.get_input_embeddings()
        for name, module in model.named_modules()
        if name.startswith(of_text)
    )
    # GPT-J's table is computed, but has a fixed length as well.
    computed = any(
        name.startswith(of_text) and name.endswith("embed_positions") and len(buffer) == known
        for name, buffer in model.named_buffers()
    )
    if learned or has_table or computed:
        raise ValueError(
            f"a window has {seqlen} tokens, but {model.config.model_type} has {'learned' if learned else 'a table of'} "
            f"{known} positions. Set the window length (--seqlen) to {known} or less."
        )
    longest = max(known, _scaled_positions(config, known))
    if seqlen > longest and _has_rotary_positions(model):
        _warn_beyond_positions(model.config.model_type, seqlen, longest)


@cache
def _warn_beyond_positions(model_type: str, seqlen: int, longest: int) -> None:
    logger.warning(
        "a window has %d tokens, but this %s model was made for %d positions (max_position_embeddings in config.json): "
        "perplexities of longer windows are not meaningful. Set the window length (--seqlen) to %d or less.",
        seqlen,
        model_type,
        longest,
        longest,
    )


def _has_rotary_positions(model: PreTrainedModel) -> bool:
    """Return whether the model has and uses rotary embeddings; Falcon has their buffers with ALiBi as well."""
    frequencies = any(name.endswith("inv_freq") for name, _ in model.named_buffers())
    return frequencies and not getattr(model.config.get_text_config(), "alibi", False)


def _scaled_positions(config: PretrainedConfig, known: int) -> int:
    """Return the number of positions after scaling of the rotary embeddings; 0 without scaling.

    ``max_position_embeddings`` may be the number before (linear, YaRN) or after (LLaMA 3) scaling.
    """
    rope = getattr(config, "rope_parameters", None)
    kinds = [rope, *rope.values()] if isinstance(rope, dict) else []  # one, or one per layer type
    return max(
        (
            int(kind["factor"] * (kind.get("original_max_position_embeddings") or known))
            for kind in kinds
            if isinstance(kind, dict) and isinstance(kind.get("factor"), int | float)
        ),
        default=0,
    )
