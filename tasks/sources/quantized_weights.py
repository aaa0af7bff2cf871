"""Quantized weights that an import dequantizes: found among the stored tensors by the names of their scales."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.models.dequantization import dequantize_fp8, dequantize_mxfp4
from layerwise.storage.formats.tensor_entry import TensorEntry, dtype_name
from layerwise.tasks.sources.checkpoint_files import QuantizedWeight, StoredTensor

QUANTIZATION = "quantization_config"  # entry of config.json
DTYPE = torch.bfloat16  # of dequantized weights, as transformers loads them


@dataclass(frozen=True)
class Method:
    """A way to store quantized weights.

    Attributes:
        values: suffix of the tensor with the values, after the name of the weight.
        scales: suffix of the tensor with the scales.
        ignored: suffixes of tensors that only quantized computation uses.
        dequantize: returns the weight, given values, scales and the quantization's entry of config.json.
    """

    values: str
    scales: str
    ignored: tuple[str, ...]
    dequantize: Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]


def _fp8(values: Tensor, scales: Tensor, settings: Mapping[str, Any]) -> Tensor:
    block = settings.get("weight_block_size")
    return dequantize_fp8(values, scales, None if block is None else (block[0], block[1]), DTYPE)


def _mxfp4(values: Tensor, scales: Tensor, _settings: Mapping[str, Any]) -> Tensor:
    return dequantize_mxfp4(values, scales, DTYPE)


METHODS = {  # by quant_method
    "fp8": Method("", "_scale_inv", (".activation_scale", ".input_scale"), _fp8),
    "mxfp4": Method("_blocks", "_scales", (), _mxfp4),
}


def quantization_of(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantization in the content of ``config.json`` if an import can undo it, else None."""
    settings = document.get(QUANTIZATION)
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return settings if isinstance(method, str) and method in METHODS else None


def dequantized_tensors(
    stored: Mapping[str, StoredTensor], settings: Mapping[str, Any], source: str
) -> dict[str, StoredTensor]:
    """Replace values and scales by the weights that they stand for.

    Args:
        settings: entry of config.json, see ``quantization_of``.
        source: name of the checkpoint, for errors.

    Raises:
        ValueError: the scales of a weight do not fit its shape.
    """
    method = METHODS[settings["quant_method"]]
    found: dict[str, StoredTensor] = {}
    scales_of = {
        scales.removesuffix(method.scales): scales for scales in stored if scales.endswith(method.scales)
    }
    used = {each + suffix for each in scales_of for suffix in (method.values, method.scales)}
    for name, place in stored.items():
        if name not in used and not name.endswith(method.ignored):
            found[name] = place
    for name, scales in scales_of.items():
        values = name + method.values
        if values not in stored:
            raise ValueError(
                f"{source} has the scales {scales}, but no {values}. Files are missing: copy all of them again."
            )
        quantized = QuantizedWeight(values, stored[values], scales, stored[scales], settings)
        try:
            weight = dequantized(quantized, *(_empty(stored[each].entry) for each in (values, scales)))
        except (ValueError, RuntimeError, LookupError, TypeError, ArithmeticError) as error:
            raise ValueError(
                f"{values} of {source} cannot be dequantized: {error}. Copy the files again, or use the original model."
            ) from error
        entry = TensorEntry(dtype_name(weight.dtype), tuple(weight.shape), stored[values].entry.offset)
        found[name] = StoredTensor(stored[values].file, entry, quantized)
    return found


def dequantized(weight: QuantizedWeight, values: Tensor, scales: Tensor) -> Tensor:
    """Return the weight that ``values`` and ``scales`` stand for."""
    return METHODS[weight.settings["quant_method"]].dequantize(values, scales, weight.settings)


def _empty(entry: TensorEntry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")
