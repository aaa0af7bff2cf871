"""The compiled kernel: where it is, what this CPU can run of it, and how to call it."""

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from layerwise.sparse.build import LIBRARY
from layerwise.sparse.panel_weight import PanelWeight, panel_width

Level = Literal["portable", "avx2", "avx512", "avx512_bf16"]
LEVELS: tuple[Level, ...] = get_args(Level)  # in the order of kernel.cpp's Level
KINDS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}  # in the order of kernel.cpp's Kind
INTERFACE = (
    2  # of kernel.cpp, raised by hand in both: a library that was built from other sources is not called
)


class _SparseWeight(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("panel_columns", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Kernel:
    """The library, at one level of instructions.

    Attributes:
        library: as ``ctypes`` has it.
        level: what it calculates with.
    """

    library: ctypes.CDLL
    level: Level

    def __post_init__(self) -> None:
        highest = LEVELS[self.library.layerwise_level()]
        if LEVELS.index(self.level) > LEVELS.index(highest):
            raise ValueError(f"this CPU runs the sparse kernel up to {highest}, not {self.level}.")

    def multiply(self, weight: PanelWeight, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """``inputs @ weight.T + bias`` without the zeros' work, summed in float32.

        Args:
            weight: on the CPU.
            inputs: shape ``(tokens, in_features)``, in the dtype of the weight (int8: bfloat16 or float32).
            bias: shape ``(out_features,)``, in the dtype of the inputs.

        Returns:
            Shape ``(tokens, out_features)``, in the dtype of the inputs.

        Raises:
            TypeError: a dtype that does not fit.
            ValueError: a shape that does not fit, or tensors on another device.
            MemoryError: no room for the inputs' copy.
        """
        self.require_fit(weight, inputs, bias)
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(inputs.shape[0], weight.shape[0])
        failed = self.library.layerwise_multiply(
            ctypes.byref(_pointers(weight)),
            LEVELS.index(self.level),
            torch.get_num_threads(),
            KINDS[inputs.dtype],
            inputs.shape[0],
            inputs.data_ptr(),
            None if bias is None else bias.contiguous().data_ptr(),
            outputs.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for a copy of inputs of shape {tuple(inputs.shape)}.")
        return outputs

    def dense_dtype(self, inputs: torch.dtype) -> torch.dtype:
        """What ``unpack_rows`` makes for inputs of this dtype: what this level's CPUs multiply fastest."""
        fast_bfloat16 = self.level == "avx512_bf16" and inputs == torch.bfloat16
        return torch.bfloat16 if fast_bfloat16 else torch.float32

    def unpack_rows(self, weight: PanelWeight, first: int, rows: Tensor) -> None:
        """Fill ``rows`` with those of ``weight`` from ``first`` on, zeros included.

        Of int8 values bfloat16 rows have the steps, exactly, and not yet times their row's scale.

        Args:
            rows: shape ``(count, in_features)``, contiguous, in ``dense_dtype`` of the inputs; ``first + count`` is at
                most ``out_features``.
        """
        assert rows.is_contiguous(), "rows of a scratch are contiguous"
        assert rows.dtype == self.dense_dtype(rows.dtype), f"a scratch of {rows.dtype} was passed"
        assert weight.values.dtype != torch.float32 or rows.dtype == torch.float32, (
            "rows would lose bits of values"
        )
        assert rows.shape[1] == weight.shape[1], f"a scratch for {rows.shape[1]} columns was passed"
        assert 0 <= first <= first + len(rows) <= weight.shape[0], "there are no such rows"
        self.library.layerwise_unpack(
            ctypes.byref(_pointers(weight)),
            LEVELS.index(self.level),
            torch.get_num_threads(),
            KINDS[rows.dtype],
            first,
            first + len(rows),
            rows.data_ptr(),
        )

    @staticmethod
    def require_fit(weight: PanelWeight, inputs: Tensor, bias: Tensor | None) -> None:
        """Refuse what cannot be multiplied; arguments and errors are those of ``multiply``."""
        rows, columns = weight.shape
        if not (inputs.is_cpu and weight.values.is_cpu and (bias is None or bias.is_cpu)):
            raise ValueError(
                f"the sparse kernel runs on the CPU, but the inputs are on {inputs.device}, the weight on "
                f"{weight.values.device}{'' if bias is None else f', the bias on {bias.device}'}. Move them to the "
                "CPU, or use the dense model on the other device."
            )
        dtype = weight.values.dtype
        fitting = (torch.bfloat16, torch.float32) if dtype == torch.int8 else (dtype,)
        if inputs.dtype not in fitting or (bias is not None and bias.dtype != inputs.dtype):
            raise TypeError(
                f"a {dtype} weight was to be multiplied with {inputs.dtype} inputs"
                f"{'' if bias is None else f' and a {bias.dtype} bias'}. Use {' or '.join(map(str, fitting))} for all."
            )
        if inputs.ndim != 2 or inputs.shape[1] != columns or (bias is not None and bias.shape != (rows,)):
            raise ValueError(
                f"a weight of shape {weight.shape} does not go with inputs of shape {tuple(inputs.shape)}"
                f"{'' if bias is None else f' and a bias of {tuple(bias.shape)}'}. Pass (tokens, {columns}) and "
                f"({rows},)."
            )


@cache
def kernel() -> Kernel | None:
    """The kernel at the highest level of this CPU; None, said once, where it was not built or cannot be loaded."""
    try:
        library = load(LIBRARY)
    except OSError as error:
        logging.getLogger(__name__).warning(
            "pruned models run as slowly as dense ones: %s. Where there is a C++ compiler, "
            "`python -m layerwise.sparse.build` makes the sparse kernel.",
            error,
        )
        return None
    return Kernel(library, LEVELS[library.layerwise_level()])


def load(path: Path) -> ctypes.CDLL:
    """Load a library built from ``kernel.cpp``; after torch, whose OpenMP threads it then shares.

    Raises:
        OSError: no such file, one for another system, or one that was built from other sources.
    """
    if not path.exists():
        raise OSError(f"{path} does not exist")
    library = ctypes.CDLL(str(path))
    if (found := library.layerwise_interface()) != INTERFACE:
        raise OSError(f"{path} has interface {found}, not {INTERFACE}: install layerwise again")
    number, integer, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    weight = ctypes.POINTER(_SparseWeight)
    library.layerwise_multiply.argtypes = [weight, number, number, number, integer, address, address, address]
    library.layerwise_unpack.argtypes = [weight, number, number, number, integer, integer, address]
    return library


def _pointers(weight: PanelWeight) -> _SparseWeight:
    rows, columns = weight.shape
    return _SparseWeight(
        rows,
        columns,
        panel_width(columns),
        weight.mask.data_ptr(),
        weight.values.data_ptr(),
        weight.starts.data_ptr(),
        None if weight.scales is None else weight.scales.data_ptr(),
        KINDS[weight.values.dtype],
    )
