"""A linear layer whose weight stays packed: the kernel for a few tokens, dense blocks of the weight for many."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from layerwise.sparse.bitmask import PackedWeight
from layerwise.sparse.native import Kernel, kernel
from layerwise.sparse.panel_weight import PanelWeight, panels_of

# Up to so many tokens the kernel is faster, which reads the weight once for every 8 of them.
KERNEL_TOKENS = 16
# Beyond, rows are unpacked into so much scratch at a time, which stays in the last-level cache.
SCRATCH_BYTES = 8 << 20

_scratch = threading.local()  # one for all linears that a thread runs


class BitmaskLinear(nn.Module):
    """``x @ weight.T + bias`` for inference on the CPU; the weight is kept as a bitmask and its stored values.

    Sums are kept in float32. The state dict has the weight as an ordinary dense tensor, made for the occasion, so that
    a model with such linears is saved as the checkpoint it came from; nothing can be loaded into one. Without the
    compiled kernel it calculates with that dense tensor, which is slow: ``accelerate`` leaves linears dense then. The
    packed parts are in huge pages; those of a copy (``deepcopy``, pickle) are not, which makes it a little slower.

    Args:
        packed: weight of shape ``(out_features, in_features)``, bfloat16 or float32.
        bias: shape ``(out_features,)``, in the dtype of the weight.
        int8: round the weight to 127 steps of a scale per row, to either side of zero.
        transposed: the state dict has the weight as ``(in_features, out_features)``, as GPT-2's Conv1D.

    Raises:
        TypeError: another dtype.
        ValueError: an empty weight, one that is not finite with ``int8``, or a bias that does not fit.
        OSError: no memory for the packed parts.
    """

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None = None, int8: bool = False, transposed: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.dtype, self.transposed = packed.values.dtype, transposed
        if bias is not None and (bias.shape != (self.out_features,) or bias.dtype != self.dtype):
            raise ValueError(
                f"a {self.dtype} weight of shape {packed.shape} does not go with a {bias.dtype} bias of shape "
                f"{tuple(bias.shape)}. Pass one number per output, in the dtype of the weight."
            )
        # No buffers: moving or converting the model must not tear the parts of a packed weight asunder.
        self.panels: PanelWeight = panels_of(packed, int8)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """A dense copy, as the state dict has it; int8 values as what they stand for."""
        dense = self.panels.dense().to(self.dtype)
        return dense.T.contiguous() if self.transposed else dense

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shape ``(..., in_features)`` to ``(..., out_features)``, in the same dtype.

        Raises:
            RuntimeError: a gradient is wanted.
            TypeError: inputs of another dtype than the weight.
            ValueError: inputs of another width, or not on the CPU.
        """
        if hidden_states.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a BitmaskLinear has no gradient, it is for inference. Use torch.no_grad(), or train the dense model."
            )
        inputs = hidden_states.reshape(-1, hidden_states.shape[-1])
        native = kernel()
        if native is None:
            outputs = linear(inputs, self.panels.dense().to(self.dtype), self.bias)
        elif len(inputs) <= KERNEL_TOKENS:
            outputs = native.multiply(self.panels, inputs, self.bias)
        else:
            outputs = multiply_in_blocks(native, self.panels, inputs, self.bias)
        return outputs.view(*hidden_states.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        sparsity = 1 - self.panels.values.numel() / (self.out_features * self.in_features)
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, sparsity={sparsity:.3f}, "
            f"values={self.panels.values.dtype}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        error_messages = args[-1]
        if any(name.startswith(prefix) for name in state_dict):
            error_messages.append(
                f"{prefix.removesuffix('.')} is packed for inference and takes no weights. Load them into the dense "
                "model and accelerate that."
            )


def multiply_in_blocks(
    native: Kernel, weight: PanelWeight, inputs: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``inputs @ weight.T + bias`` by dense products with some rows of ``weight`` at a time.

    Arguments, result and errors are those of ``Kernel.multiply``.
    """
    native.require_fit(weight, inputs, bias)
    dtype = native.dense_dtype(inputs.dtype)
    outputs = inputs.new_empty(len(inputs), weight.shape[0])
    inputs = inputs.to(dtype)
    step = max(1, SCRATCH_BYTES // (weight.shape[1] * dtype.itemsize))
    for first in range(0, weight.shape[0], step):
        last = min(first + step, weight.shape[0])
        rows = _scratch_rows(last - first, weight.shape[1], dtype)
        native.unpack_rows(weight, first, rows)
        block_bias = None if bias is None else bias[first:last].to(dtype)
        if weight.scales is not None and dtype == torch.bfloat16:
            product = linear(inputs, rows).float() * weight.scales[first:last]
            outputs[:, first:last] = product if block_bias is None else product + block_bias
        else:
            outputs[:, first:last] = linear(inputs, rows, block_bias)
    return outputs


def _scratch_rows(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory that is already there: to have it from the system costs half as much again as filling it."""
    wanted = rows * columns * dtype.itemsize
    if getattr(_scratch, "bytes", torch.empty(0)).numel() < wanted:
        _scratch.bytes = torch.empty(max(wanted, SCRATCH_BYTES), dtype=torch.uint8)
    return _scratch.bytes[:wanted].view(dtype).view(rows, columns)
