"""Acceleration of a pruned model on the CPU: replaces linears with many zeros by linears with packed weights."""

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

# Sparsity from which a packed linear is faster than torch's dense one, for one token at a time. With bfloat16
# instructions it is faster even without zeros, because torch's product is slow; from 0.2 it is also smaller. The
# portable loop is useful only for nearly empty matrices.
LEAST_SPARSITY: dict[Level, float] = {"portable": 0.9, "avx2": 0.5, "avx512": 0.5, "avx512_bf16": 0.2}
LEAST_WEIGHTS = 1 << 16  # for a smaller matrix, the overhead of a call exceeds the gain


@dataclass(frozen=True)
class SparseLinear:
    """A linear that was replaced by a packed one.

    Attributes:
        name: name of the module within the model.
        sparsity: fraction of its weights that are zero.
        dense_bytes: size of its dense weight.
        sparse_bytes: size of its packed weight.
    """

    name: str
    sparsity: float
    dense_bytes: int
    sparse_bytes: int


@dataclass(frozen=True)
class Acceleration:
    """Result of ``accelerate``.

    Attributes:
        level: instruction set of the kernel; None without a kernel, in which case all linears stay dense.
        sparse: linears that were replaced by packed ones.
        dense: linears that stay dense: name and reason.
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
    """Replace the sufficiently sparse linears of ``model`` in place by packed ones, for inference.

    The rest of the model does not change; ``generate``, the cache and batches work as before. The parameters no longer
    require gradients. For up to 16 tokens at a time (generating text), a packed linear multiplies by the nonzero
    weights only. For more tokens (reading a prompt), it takes about as long as a dense one.

    Args:
        model: a model on the CPU, in bfloat16 or float32, with its weights loaded.
        int8: whether to round nonzero weights to multiples of 1/127 of the largest weight of their row. This needs less
            memory, but changes the model slightly.
        packed: weights that are already packed, by their names in the model (``...q_proj.weight``). The model's own
            weights of these names are ignored and may be on the meta device.

    Returns:
        Linears that were replaced, and the reasons for those that were not.

    Raises:
        ValueError: a weight is not on the CPU, or a packed weight does not match a linear of the model.
        OSError: there is not enough memory for the packed weights.
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
        # Adding zero turns -0.0 into +0.0; the bits of -0.0 would be stored as a weight.
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
            found = (
                f"shape {tuple(_oriented(linears[name]).shape)} for it"
                if name in linears
                else "no such linear"
            )
            raise ValueError(
                f"the packed weight {name} has shape {weight.shape}, but the model has {found}. Pass "
                "the weights of this model, under the names in its state dict."
            )
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" and name not in packed:
            raise ValueError(
                f"{name} is on the device {parameter.device}; sparse linears run on the CPU. Load the model's weights "
                "on the CPU, or use the dense model."
            )


def _reason_to_stay_dense(
    module: nn.Linear | Conv1D, packed: PackedWeight | None, level: Level | None
) -> str | None:
    """Return the reason to keep a linear dense, or None."""
    if level is None:
        return "the sparse kernel was not built"
    if type(module) not in (nn.Linear, Conv1D):
        return f"a {type(module).__name__} may compute more than a product"
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
    """Return the weight as ``(out_features, in_features)``."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def _stored(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight of shape ``(out_features, in_features)`` in the orientation of the module."""
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def _facts(name: str, weight: PackedWeight, swapped: BitmaskLinear) -> SparseLinear:
    rows, columns = weight.shape
    sparsity = 1 - weight.values.numel() / (rows * columns)
    return SparseLinear(name, sparsity, rows * columns * weight.values.itemsize, swapped.panels.nbytes)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule ``name`` of ``model`` by ``module``."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
