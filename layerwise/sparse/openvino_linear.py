"""Dense linear by OpenVINO: a baseline that multiplies one token faster than torch."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn


def has_openvino() -> bool:
    """Return whether OpenVINO is installed. It is optional."""
    return find_spec("openvino") is not None


@cache
def _core() -> Any:
    """Return the process's only OpenVINO core.

    ``openvino.compile_model`` creates a core per call, each with a signal stack of the main thread. These are not freed
    in the order of their creation (2026.4.1), so the next signal uses freed memory: Ctrl-C after a measurement caused
    a segmentation fault.
    """
    import openvino

    return openvino.Core()


class OpenVinoLinear(nn.Module):
    """``x @ weight.T + bias`` by OpenVINO's CPU plugin, which keeps its own copy of the weight.

    Args:
        linear: linear to replace, on the CPU, in bfloat16 or float32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        import openvino
        from openvino import opset13

        weight = linear.weight.detach().contiguous()
        in_bfloat16 = weight.dtype == torch.bfloat16
        self.openvino_type = openvino.Type.bf16 if in_bfloat16 else openvino.Type.f32
        self.numpy_dtype = torch.int16 if in_bfloat16 else torch.float32  # numpy has no bfloat16
        self.openvino_tensor = openvino.Tensor
        inputs = opset13.parameter([-1, linear.in_features], self.openvino_type)
        product = opset13.matmul(inputs, opset13.constant(self._shared(weight)), False, True)
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if in_bfloat16 else "f32",
        }
        compiled = _core().compile_model(openvino.Model([product], [inputs]), "CPU", settings)
        self.request = compiled.create_infer_request()
        self.out_features, self.weight_bytes, self.bias = linear.out_features, weight.nbytes, linear.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states of shape ``(..., in_features)`` to ``(..., out_features)``, in the same dtype."""
        inputs = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        self.request.set_input_tensor(self._shared(inputs))
        self.request.infer()
        bits = self.request.get_output_tensor().data.view(str(self.numpy_dtype).removeprefix("torch."))
        outputs = torch.from_numpy(bits.copy()).view(hidden_states.dtype)
        outputs = outputs.reshape(*hidden_states.shape[:-1], self.out_features)
        return outputs if self.bias is None else outputs + self.bias

    def _shared(self, tensor: Tensor) -> Any:
        return self.openvino_tensor(
            tensor.view(self.numpy_dtype).numpy(), list(tensor.shape), self.openvino_type
        )
