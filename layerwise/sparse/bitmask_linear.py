"""Linear with a packed weight: the kernel multiplies few tokens, dense blocks of the weight multiply many."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from layerwise.sparse.bitmask import PackedWeight
from layerwise.sparse.native import Kernel, kernel
from layerwise.sparse.panel_weight import PanelWeight, panels_of

# Maximum number of tokens for which the kernel is faster; it reads the weight once for every 8 tokens.
KERNEL_TOKENS = 16
# Size of the buffer for unpacked rows, used for more tokens; it fits in the last-level cache.
SCRATCH_BYTES = 8 << 20

_scratch = threading.local()  # one buffer per thread, shared by all linears


class BitmaskLinear(nn.Module):
    """``x @ weight.T + bias`` for inference on the CPU, with the weight stored as bitmask and values.

    Sums are in float32. The state dict contains the weight as a dense tensor, which is unpacked on request, so saving
    the model gives an ordinary checkpoint. Loading a state dict is not supported. Without the compiled kernel the
    linear computes with the dense tensor, which is slow; ``accelerate`` then keeps linears dense. The packed parts are
    in huge pages. Those of a copy (``deepcopy``, pickle) are not, so a copy is slightly slower.

    Args:
        packed: weight of shape ``(out_features, in_features)``, bfloat16 or float32.
        bias: shape ``(out_features,)``, in the dtype of the weight.
        int8: whether to round the weight to 127 steps of a scale per row on either side of zero.
        transposed: whether the state dict has the weight as ``(in_features, out_features)``, like GPT-2's Conv1D.

    Raises:
        TypeError: the weight has another dtype.
        ValueError: the weight is empty, or not finite with ``int8``, or the bias does not match.
        OSError: there is not enough memory for the packed parts.
    """

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None = None, int8: bool = False, transposed: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.dtype, self.transposed = packed.values.dtype, transposed
        if bias is not None and (bias.shape != (self.out_features,) or bias.dtype != self.dtype):
            raise ValueError(
                f"a {self.dtype} weight of shape {packed.shape} does not match a {bias.dtype} bias of shape "
                f"{tuple(bias.shape)}. Pass one number per output, in the dtype of the weight."
            )
        # Not buffers, because moving or converting the model must not change single parts of a packed weight.
        self.panels: PanelWeight = panels_of(packed, int8)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """Return a dense copy in the orientation of the state dict, with int8 values multiplied by their scale."""
        dense = self.panels.dense().to(self.dtype)
        return dense.T.contiguous() if self.transposed else dense

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states of shape ``(..., in_features)`` to ``(..., out_features)``, in the same dtype.

        Raises:
            RuntimeError: a gradient is required.
            TypeError: the inputs have another dtype than the weight.
            ValueError: the inputs have another width, or are not on the CPU.
        """
        if hidden_states.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a BitmaskLinear has no gradient, because it is for inference only. Use torch.no_grad(), or train the "
                "dense model."
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
                f"{prefix.removesuffix('.')} is packed for inference and cannot load weights. Load them into the dense "
                "model and accelerate that model."
            )


def multiply_in_blocks(
    native: Kernel, weight: PanelWeight, inputs: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute ``inputs @ weight.T + bias`` by dense products with a block of rows of ``weight`` at a time.

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
    """Return a view of the thread's buffer; allocating a new one would take half as long again as filling it."""
    wanted = rows * columns * dtype.itemsize
    if getattr(_scratch, "bytes", torch.empty(0)).numel() < wanted:
        _scratch.bytes = torch.empty(max(wanted, SCRATCH_BYTES), dtype=torch.uint8)
    return _scratch.bytes[:wanted].view(dtype).view(rows, columns)
