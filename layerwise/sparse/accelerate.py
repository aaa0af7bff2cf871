"""Make a pruned model faster on the CPU: linears with many zeros keep their weights packed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerwise.display.byte_size import size_in
from layerwise.sparse.bitmask import PackedWeight, pack, unpack
from layerwise.sparse.bitmask_linear import BitmaskLinear
from layerwise.sparse.native import Level, kernel

# From which sparsity on a linear is faster packed than as torch multiplies it, one token at a time. With instructions
# for bfloat16 it is even without zeros, as torch's own product is slow; a fifth of them makes it smaller, too. The
# portable loop is only for what is nearly empty.
LEAST_SPARSITY: dict[Level, float] = {"portable": 0.9, "avx2": 0.5, "avx512": 0.5, "avx512_bf16": 0.2}
LEAST_WEIGHTS = 1 << 16  # a smaller matrix is multiplied faster than a call is prepared


@dataclass(frozen=True)
class SparseLinear:
    """A linear that runs packed.

    Attributes:
        name: of the module within the model.
        sparsity: share of its weights that are zero.
        dense_bytes: of its weight before.
        sparse_bytes: of its weight now.
    """

    name: str
    sparsity: float
    dense_bytes: int
    sparse_bytes: int


@dataclass(frozen=True)
class Acceleration:
    """What ``accelerate`` did to a model.

    Attributes:
        level: instructions of the kernel; None where there is no kernel, and all stays dense.
        sparse: the linears that run packed.
        dense: name of every linear that stays dense, with the reason.
    """

    level: Level | None
    sparse: tuple[SparseLinear, ...]
    dense: Mapping[str, str]

    def __str__(self) -> str:
        dense_bytes = sum(linear.dense_bytes for linear in self.sparse)
        sparse_bytes = sum(linear.sparse_bytes for linear in self.sparse)
        reasons = Counter(self.dense.values())
        lines = [
            f"{len(self.sparse)} of {len(self.sparse) + len(self.dense)} linears run sparse ({self.level}): "
            f"{size_in('MB', dense_bytes)} of weights are {size_in('MB', sparse_bytes)}",
            *(f"{count} stay dense: {reason}" for reason, count in reasons.most_common()),
        ]
        return "\n".join(lines)


def accelerate(
    model: nn.Module, int8: bool = False, packed: Mapping[str, PackedWeight] | None = None
) -> Acceleration:
    """Swap the linears of ``model`` that are sparse enough to gain by it, in place, for inference.

    Everything else of the model stays as it is: ``generate``, its cache and batches work as before. Its parameters no
    longer ask for gradients. With up to 16 tokens at a time (generating text) a swapped linear multiplies only with
    the weights that are there; with more (reading a prompt) it takes about as long as a dense one.

    Args:
        model: on the CPU, in bfloat16 or float32, its weights loaded.
        int8: keep the weights that are there as whole numbers of 127ths of their row's largest one; smaller, and not
            exactly the same model.
        packed: weights that are packed already, by their names in the model (``...q_proj.weight``); what the model has
            in their place is not looked at, and may be on the meta device.

    Returns:
        What was swapped, and what was not and why.

    Raises:
        ValueError: a weight that is not on the CPU, or a packed one for which the model has no linear of that shape.
        OSError: no memory for the packed weights.
    """
    packed = dict(packed or {})
    _require_weights(model, packed)
    native = kernel()
    shared = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    sparse, dense = [], {}
    for name, module in [*model.named_modules()]:
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        given = packed.get(f"{name}.weight")
        reason = _reason_to_stay_dense(module, given, native.level if native else None)
        if reason is None and given is None and shared[id(module.weight)] > 1:
            reason = "another module uses the same weight"
        if reason is not None:
            dense[name] = reason
            if given is not None:
                module.weight = nn.Parameter(_stored(module, unpack(given)), requires_grad=False)
            continue
        # Adding zero makes +0.0 of -0.0, whose bits would count as a weight to be stored.
        weight = given if given is not None else pack(_oriented(module).detach() + 0.0)
        swapped = BitmaskLinear(weight, module.bias, int8, transposed=isinstance(module, Conv1D))
        sparse.append(_facts(name, weight, swapped))
        replace_module(model, name, swapped)
    model.requires_grad_(False)
    return Acceleration(native.level if native else None, tuple(sparse), dense)


def _require_weights(model: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    for name, weight in packed.items():
        if name not in linears or _oriented(linears[name]).shape != weight.shape:
            found = f"one of {tuple(_oriented(linears[name]).shape)}" if name in linears else "none"
            raise ValueError(
                f"a packed weight of shape {weight.shape} is for the linear {name}, but the model has {found}. Pass "
                "the weights of this model, under the names of its state dict."
            )
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" and name not in packed:
            raise ValueError(
                f"{name} is on the device {parameter.device}; sparse linears run on the CPU. Load the model's weights "
                "there, or leave it as it is."
            )


def _reason_to_stay_dense(
    module: nn.Linear | Conv1D, packed: PackedWeight | None, level: Level | None
) -> str | None:
    """Why this linear is better off dense, or None."""
    if level is None:
        return "the sparse kernel was not built"
    if type(module) not in (nn.Linear, Conv1D):
        return f"a {type(module).__name__} may do more than multiply"
    dtype = module.weight.dtype if packed is None else packed.values.dtype
    if dtype not in (torch.bfloat16, torch.float32):
        return f"its weights are {str(dtype).removeprefix('torch.')}, not bfloat16 or float32"
    if module.weight.numel() < LEAST_WEIGHTS:
        return f"fewer than {LEAST_WEIGHTS} weights"
    if _sparsity(module, packed) < LEAST_SPARSITY[level]:
        return f"sparsity below {LEAST_SPARSITY[level]:g}"
    return None


def _sparsity(module: nn.Linear | Conv1D, packed: PackedWeight | None) -> float:
    stored = int(module.weight.count_nonzero()) if packed is None else packed.values.numel()
    return 1 - stored / module.weight.numel()


def _oriented(module: nn.Module) -> Tensor:
    """The weight as ``(out_features, in_features)``."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def _stored(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight of ``(out_features, in_features)`` as the module keeps it."""
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def _facts(name: str, weight: PackedWeight, swapped: BitmaskLinear) -> SparseLinear:
    rows, columns = weight.shape
    sparsity = 1 - weight.values.numel() / (rows * columns)
    return SparseLinear(name, sparsity, rows * columns * weight.values.itemsize, swapped.panels.nbytes)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one that ``model`` knows by this name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
