"""A model in every way that this machine can run it: by torch, by OpenVINO, packed."""

from copy import deepcopy

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layerwise.sparse.accelerate import accelerate, replace_module
from layerwise.sparse.bitmask_linear import BitmaskLinear
from layerwise.sparse.openvino_linear import OpenVinoLinear, has_openvino

WAYS = FLOAT32, BFLOAT16, OPENVINO, SPARSE, INT8 = (
    "torch float32",
    "torch bfloat16",
    "OpenVINO",
    "sparse",
    "sparse int8",
)


def ways_of(model: PreTrainedModel) -> tuple[dict[str, PreTrainedModel], dict[str, str]]:
    """The model in every way, and the ways that are not to be had here, with the reason."""
    own = BFLOAT16 if model.dtype == torch.bfloat16 else FLOAT32
    ways, left_out = {own: model}, {}
    for name, int8 in ((SPARSE, False), (INT8, True)):
        packed = _sharing(model)
        done = accelerate(packed, int8)
        if done.sparse:
            ways[name] = packed
        else:
            left_out[name] = f"no linear runs sparse: {', '.join(sorted(set(done.dense.values())))}"
    bytes_of = sum(parameter.nbytes for parameter in model.parameters())
    if not has_openvino():
        left_out[OPENVINO] = "not installed (pip install openvino): a good dense engine to compare with"
    elif (reason := _no_room(bytes_of)) is not None:
        left_out[OPENVINO] = reason
    else:
        ways[OPENVINO] = _by_openvino(model)
    if own == FLOAT32:
        left_out[BFLOAT16] = "this CPU has no fast instructions for it"
    elif (reason := _no_room(2 * bytes_of)) is not None:
        left_out[FLOAT32] = reason
    else:
        ways[FLOAT32] = deepcopy(model).float()
    return {name: ways[name] for name in WAYS if name in ways}, left_out


def _no_room(needed: int) -> str | None:
    """Why a copy of so many bytes is not made, or None; it is to leave a tenth of itself and a GB free."""
    free = psutil.virtual_memory().available
    if 1.1 * needed + 1e9 < free:
        return None
    return f"would need {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free"


def _by_openvino(model: PreTrainedModel) -> PreTrainedModel:
    other = _sharing(model)
    for name, module in _linears(other).items():
        if type(module) is nn.Linear:
            replace_module(other, name, OpenVinoLinear(module))
    return other


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own and the same parameters."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | BitmaskLinear | OpenVinoLinear)
    }


def linears_run_by(way: nn.Module) -> int:
    """How many linears are multiplied in the way's own manner: those that were swapped, or all of a model by torch."""
    linears = _linears(way).values()
    swapped = [module for module in linears if isinstance(module, BitmaskLinear | OpenVinoLinear)]
    return len(swapped or linears)


def weight_bytes(model: nn.Module) -> int:
    """Of all linears: what is read for every new token."""
    return sum(_bytes_of(module) for module in _linears(model).values())


def _bytes_of(module: nn.Module) -> int:
    if isinstance(module, BitmaskLinear):
        return module.panels.nbytes
    if isinstance(module, OpenVinoLinear):
        return module.weight_bytes
    assert isinstance(module.weight, Tensor)
    return module.weight.nbytes
