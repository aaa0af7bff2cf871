"""Engines that can run a model on this machine: torch, OpenVINO, and sparse linears."""

from copy import deepcopy

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layerwise.display.byte_size import size_in
from layerwise.models.skeleton import text_modules
from layerwise.sparse.accelerate import accelerate, replace_module
from layerwise.sparse.bitmask_linear import BitmaskLinear
from layerwise.sparse.openvino_linear import OpenVinoLinear, has_openvino

ENGINES = FLOAT32, BFLOAT16, OPENVINO, SPARSE, INT8 = (
    "torch float32",
    "torch bfloat16",
    "OpenVINO",
    "sparse",
    "sparse int8",
)


def engines_of(model: PreTrainedModel) -> tuple[dict[str, PreTrainedModel], dict[str, str]]:
    """Prepare the model for every engine.

    Returns:
        The model for each available engine, and the reason for each unavailable one.
    """
    own = BFLOAT16 if model.dtype == torch.bfloat16 else FLOAT32
    engines, left_out = {own: model}, {}
    for name, int8 in ((SPARSE, False), (INT8, True)):
        packed = _sharing(model)
        done = accelerate(packed, int8)
        if done.sparse:
            engines[name] = packed
        else:
            left_out[name] = f"no linear runs sparse: {', '.join(sorted(set(done.dense.values())))}"
    bytes_of = sum(parameter.nbytes for parameter in model.parameters())
    if not has_openvino():
        left_out[OPENVINO] = "not installed (pip install openvino); it is a fast dense engine for comparison"
    elif (reason := _no_room(bytes_of)) is not None:
        left_out[OPENVINO] = reason
    else:
        engines[OPENVINO] = _by_openvino(model)
    if own == FLOAT32:
        left_out[BFLOAT16] = "this CPU has no fast bfloat16 instructions"
    elif (reason := _no_room(2 * bytes_of)) is not None:
        left_out[FLOAT32] = reason
    else:
        engines[FLOAT32] = deepcopy(model).float()
    return {name: engines[name] for name in ENGINES if name in engines}, left_out


def _no_room(needed: int) -> str | None:
    """Return the reason not to copy ``needed`` bytes, or None; 10 % of them and 1 GB must remain free."""
    free = psutil.virtual_memory().available
    if 1.1 * needed + 1e9 < free:
        return None
    return f"needs {size_in('GB', needed, 1)}, but only {size_in('GB', free, 1)} are free"


def _by_openvino(model: PreTrainedModel) -> PreTrainedModel:
    other = _sharing(model)
    for name, module in _linears(other).items():
        if type(module) is nn.Linear:
            replace_module(other, name, OpenVinoLinear(module))
    return other


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model that shares its parameters."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linears that compute with text."""
    of_text = text_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if f"{name}.".startswith(of_text)
        and isinstance(module, nn.Linear | Conv1D | BitmaskLinear | OpenVinoLinear)
    }


def linears_run_by(engine: PreTrainedModel) -> int:
    """Return the number of linears that the engine runs itself: the replaced ones, or all for torch."""
    linears = _linears(engine).values()
    swapped = [module for module in linears if isinstance(module, BitmaskLinear | OpenVinoLinear)]
    return len(swapped or linears)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the size of the weights of all linears in bytes: the memory read for every new token."""
    return sum(_bytes_of(module) for module in _linears(model).values())


def _bytes_of(module: nn.Module) -> int:
    if isinstance(module, BitmaskLinear):
        return module.panels.nbytes
    if isinstance(module, OpenVinoLinear):
        return module.weight_bytes
    assert isinstance(module.weight, Tensor)
    return module.weight.nbytes
