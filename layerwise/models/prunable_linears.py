"""Linears of the decoder layers that can be pruned. The others stay dense, and do not count in the sparsity."""

from __future__ import annotations

import logging
import re
from collections import Counter
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerwise.models.expert_names import expert_linear
from layerwise.models.experts import SeparateExperts, separate_experts
from layerwise.models.skeleton import Linear, layer_prefix, linears_of, weights_of_several_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Linear attention computes the decay and the write strength of every head's memory from these. They have one output
# per head, so they hold less than 1 % of a layer's weights, and an error in them grows along the whole sequence.
KEPT_DENSE = re.compile(
    r"(linear_attn\.(in_proj_a|in_proj_b|in_proj_ba|a_proj)|(linear_attn|self_attn)\.b_proj)$"
)
# A router of experts has one output per expert, and the gate of a shared expert has one. They decide where every token goes,
# and hold less than 1 % of a layer's weights. In many models they are not linears, so that they stay dense anyway.
ROUTER = re.compile(r"(^|\.)router(\.|$)")
# Reasons why a linear stays dense.
SMALL_GATE_REASON = "a small gate: it has one output per head, and an error in it grows along the sequence"
UNCALLED_REASON = (
    "the model does not call it but uses its weight directly, or not at all, so its inputs cannot be measured"
)
ROUTER_REASON = "it decides which experts a token reaches"
SHARED_REASON = "several layers share it, so its weights cannot be chosen for one layer"
PROBE_TOKENS = 8

# What `_called_linears` found, by configuration: a process opens the same model many times.
_called: dict[str, frozenset[str] | None] = {}


def prunable_linears(model: PreTrainedModel) -> list[tuple[Linear, ...]]:
    """Return the linears of every decoder layer that are pruned, in the order of the module tree.

    These are all except small gates (``KEPT_DENSE``), routers of experts, linears that several layers share (Zamba's attention),
    and linears that a forward pass does not call, because the statistics of their inputs cannot be measured: Mamba multiplies by the weight of its ``dt_proj`` itself, and a layer
    that uses the keys and values of an earlier layer may have projections without use. A warning names the latter.

    Args:
        model: the model, with or without weights. Its experts get linears of their own, see ``separate_experts``.
    """
    layers = _linears_by_layer(model)
    called, shared, prefix = _called_linears(model), weights_of_several_layers(model), layer_prefix(model)
    if called is not None:
        uncalled = [
            f"{index}.{linear.name}"
            for index, layer in enumerate(layers)
            for linear in layer
            if f"{index}.{linear.name}" not in called
        ]
        if uncalled:
            _warn_uncalled(model.config.model_type, tuple(uncalled))
    return [
        tuple(
            linear
            for linear in layer
            if not KEPT_DENSE.search(linear.name)
            and linear.name not in routers
            and f"{prefix}.{index}.{linear.weight_name}" not in shared
            and (called is None or f"{index}.{linear.name}" in called)
        )
        for index, (layer, routers) in enumerate(zip(layers, map(_routers, layers), strict=True))
    ]


def dense_linears(model: PreTrainedModel) -> list[str]:
    """Return the linears of all decoder layers that are not pruned, as ``layer.linear``; see ``prunable_linears``."""
    return [
        f"{index}.{linear.name}"
        for index, (layer, pruned) in enumerate(
            zip(_linears_by_layer(model), map(set, prunable_linears(model)), strict=True)
        )
        for linear in layer
        if linear not in pruned
    ]


def _linears_by_layer(model: PreTrainedModel) -> list[tuple[Linear, ...]]:
    """Return the linears of every decoder layer, also those of every expert."""
    prefix = layer_prefix(model)
    separate_experts(model, prefix)
    return [linears_of(layer) for layer in model.get_submodule(prefix).children()]


def _routers(linears: tuple[Linear, ...]) -> set[str]:
    """Return the names of the linears that choose experts, in the layers with experts."""
    experts: dict[str, int] = {}  # by the module that contains the experts
    for linear in linears:
        if (place := expert_linear(linear.name)) is not None:
            block = place.pool.removesuffix("experts")
            experts[block] = max(experts.get(block, 0), place.expert + 1)
    owners = Counter(linear.name.rpartition(".")[0] for linear in linears)
    found = set()
    for linear in linears:
        for block, number in experts.items():
            if not linear.name.startswith(block) or expert_linear(linear.name) is not None:
                continue
            # A shared expert is inside of the block too, and may be as wide as there are experts (Qwen3-Next: 512).
            owner = linear.name.rpartition(".")[0]
            is_alone = owner == block.removesuffix(".") or owners[owner] == 1
            if ROUTER.search(linear.name) or (is_alone and linear.out_features in (1, number)):
                found.add(linear.name)
    return found


def dense_rows(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return the linears that are not pruned, with the reason, as plain values: one row for each name in the layers."""
    called, layers = _called_linears(model), dict[tuple[str, str], list[int]]()
    shared, prefix = weights_of_several_layers(model), layer_prefix(model)
    for name in dense_linears(model):
        index, _, linear = name.partition(".")
        if KEPT_DENSE.search(linear):
            reason = SMALL_GATE_REASON
        elif f"{prefix}.{name}.weight" in shared:
            reason = SHARED_REASON
        else:
            reason = UNCALLED_REASON if called is not None and name not in called else ROUTER_REASON
        layers.setdefault((linear, reason), []).append(int(index))
    return [
        {"linear": linear, "layers": where, "reason": reason} for (linear, reason), where in layers.items()
    ]


@cache
def _warn_uncalled(model_type: str, names: tuple[str, ...]) -> None:
    logger.warning(
        "%d linears of this %s model are not called by its layers, which use the weights directly or not at all. They "
        "stay dense: %s",
        len(names),
        model_type,
        ", ".join(names[:4]) + (" ..." if len(names) > 4 else ""),
    )


def _called_linears(model: PreTrainedModel) -> frozenset[str] | None:
    """Return the linears that a forward pass calls, as ``layer.linear``; None if it cannot be found out."""
    separate_experts(model, layer_prefix(model))  # fused experts cannot be probed, and the key is the same
    key = f"{type(model).__name__} {model.config.to_json_string(use_diff=False)}"
    if key not in _called:
        _called[key] = _probe(model)
    return _called[key]


class _AllExperts(nn.Module):
    """Replacement for experts in a probe. All experts are called, whatever the values of the router."""

    def forward(self, hidden_states: torch.Tensor, *_arguments: object) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def _probe(model: PreTrainedModel) -> frozenset[str] | None:
    """Run the model on tensors that have shapes but no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen = set[str]()
    prefix = layer_prefix(model)
    of_experts = {
        name: [f"{name}.{linear.name}" for linear in linears_of(module)]
        for name, module in model.get_submodule(prefix).named_modules()
        if isinstance(module, SeparateExperts)
    }
    layers = model.get_submodule(prefix)
    replaced = {id(layers.get_submodule(name)): _AllExperts() for name in of_experts}
    probe = deepcopy(model, dict(replaced))

    def note(module: nn.Module, _inputs: object) -> None:
        seen.update(of_experts.get(names[module], (names[module],)))

    layers = probe.get_submodule(prefix)
    names = {module: name for name, module in layers.named_modules()}
    for name in of_experts:
        layers.get_submodule(name).register_forward_pre_hook(note)
    for index, layer in enumerate(layers.children()):
        for linear in linears_of(layer):
            layers.get_submodule(f"{index}.{linear.name}").register_forward_pre_hook(note)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in probe.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), False)
        # It logs a traceback before it raises an error.
        quiet = logging.getLogger("torch._subclasses.fake_tensor")
        was_disabled, quiet.disabled = quiet.disabled, True
        try:
            probe(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long), use_cache=False)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            # A model that looks at values. A linear that it does not call is an error when statistics are collected.
            logger.debug("the linears that %s calls are not known: %s", model.config.model_type, error)
            return None
        finally:
            quiet.disabled = was_disabled
    return frozenset(seen)
