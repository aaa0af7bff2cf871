"""Native kernel: loading the compiled library, the instruction sets of this CPU, and calls."""

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from layerwise.sparse.build import LIBRARY
from layerwise.sparse.panel_weight import PanelWeight, panel_width

Level = Literal["portable", "avx2", "avx512", "avx512_bf16"]
LEVELS: tuple[Level, ...] = get_args(Level)  # same order as Level in kernel.cpp
KINDS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}  # same order as Kind in kernel.cpp
# Types of scores that can be ranked; same order as Kind in ranking.cpp.
SCORES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}
# Version of the interface; raise it by hand here and in kernel.cpp. A library with another version is not used.
INTERFACE = 3


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
    """The compiled library, with one instruction set.

    Attributes:
        library: the loaded library.
        level: instruction set to use.
    """

    library: ctypes.CDLL
    level: Level

    def __post_init__(self) -> None:
        highest = LEVELS[self.library.layerwise_level()]
        if LEVELS.index(self.level) > LEVELS.index(highest):
            raise ValueError(
                f"this CPU supports the sparse kernel up to level {highest}, not {self.level}. Use a lower level."
            )

    def multiply(self, weight: PanelWeight, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute ``inputs @ weight.T + bias`` from the stored weights only, summed in float32.

        Args:
            weight: weight on the CPU.
            inputs: shape ``(tokens, in_features)``, in the dtype of the weight (for int8: bfloat16 or float32).
            bias: shape ``(out_features,)``, in the dtype of the inputs.

        Returns:
            Outputs, shape ``(tokens, out_features)``, in the dtype of the inputs.

        Raises:
            TypeError: the dtypes do not match.
            ValueError: the shapes do not match, or a tensor is not on the CPU.
            MemoryError: there is not enough memory for a copy of the inputs.
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
            raise MemoryError(
                f"there is not enough memory for a copy of inputs of shape {tuple(inputs.shape)}. Pass fewer tokens."
            )
        return outputs

    def dense_dtype(self, inputs: torch.dtype) -> torch.dtype:
        """Return the dtype of unpacked rows for inputs of a dtype: the one that CPUs of this level multiply fastest."""
        fast_bfloat16 = self.level == "avx512_bf16" and inputs == torch.bfloat16
        return torch.bfloat16 if fast_bfloat16 else torch.float32

    def unpack_rows(self, weight: PanelWeight, first: int, rows: Tensor) -> None:
        """Fill ``rows`` with dense rows of ``weight``, starting at row ``first``.

        For int8 values, bfloat16 rows contain the exact integer steps, not multiplied by the scale of the row.

        Args:
            weight: weight to unpack.
            first: index of the first row.
            rows: shape ``(count, in_features)``, contiguous, in the ``dense_dtype`` of the inputs; ``first + count`` is
                at most ``out_features``.
        """
        assert rows.is_contiguous(), "the buffer is not contiguous"
        assert rows.dtype == self.dense_dtype(rows.dtype), f"the buffer has dtype {rows.dtype}"
        assert weight.values.dtype != torch.float32 or rows.dtype == torch.float32, (
            "the buffer cannot hold float32 values"
        )
        assert rows.shape[1] == weight.shape[1], f"the buffer has {rows.shape[1]} columns"
        assert 0 <= first <= first + len(rows) <= weight.shape[0], "the rows are out of range"
        self.library.layerwise_unpack(
            ctypes.byref(_pointers(weight)),
            LEVELS.index(self.level),
            torch.get_num_threads(),
            KINDS[rows.dtype],
            first,
            first + len(rows),
            rows.data_ptr(),
        )

    def levels_of_rows(self, scores: Tensor, per_row: Sequence[int], extra: Sequence[int]) -> Tensor:
        """Return the level of each weight within its row; see ``row_levels.levels_of_rows``.

        Args:
            scores: shape ``(rows, columns)``, on the CPU, with a dtype of ``SCORES``.
            per_row: ascending numbers of weights to remove from every row, each in ``[0, columns]``; at most 255.
            extra: by count, the number of leading rows that lose one weight more.

        Raises:
            MemoryError: there is not enough memory for equal scores.
        """
        rows, columns = scores.shape
        assert scores.is_cpu, f"the scores are on {scores.device}"
        assert columns < 1 << 32, f"a row of {columns} scores is too long"
        assert len(per_row) == len(extra) <= 255, f"{len(per_row)} counts with {len(extra)} extra rows"
        scores = scores.contiguous()
        counts = torch.tensor([per_row, extra], dtype=torch.int64)
        levels = torch.empty(scores.shape, dtype=torch.uint8)
        failed = self.library.layerwise_levels(
            torch.get_num_threads(),
            SCORES[scores.dtype],
            rows,
            columns,
            scores.data_ptr(),
            len(per_row),
            counts[0].data_ptr(),
            counts[1].data_ptr(),
            levels.data_ptr(),
        )
        if failed:
            raise MemoryError(
                f"there is not enough memory to rank {rows} x {columns} scores, many of which are equal: up to "
                f"{8 * columns} bytes per thread. Use fewer threads (OMP_NUM_THREADS)."
            )
        return levels

    @staticmethod
    def require_fit(weight: PanelWeight, inputs: Tensor, bias: Tensor | None) -> None:
        """Raise if tensors cannot be multiplied; arguments and errors are those of ``multiply``."""
        rows, columns = weight.shape
        if not (inputs.is_cpu and weight.values.is_cpu and (bias is None or bias.is_cpu)):
            raise ValueError(
                f"the sparse kernel runs on the CPU, but the inputs are on {inputs.device}, the weight on "
                f"{weight.values.device}{'' if bias is None else f', the bias on {bias.device}'}. Move them to the "
                "CPU, or use the dense model."
            )
        dtype = weight.values.dtype
        fitting = (torch.bfloat16, torch.float32) if dtype == torch.int8 else (dtype,)
        if inputs.dtype not in fitting or (bias is not None and bias.dtype != inputs.dtype):
            raise TypeError(
                f"a {dtype} weight cannot be multiplied by {inputs.dtype} inputs"
                f"{'' if bias is None else f' with a {bias.dtype} bias'}. Use {' or '.join(map(str, fitting))} for all."
            )
        if inputs.ndim != 2 or inputs.shape[1] != columns or (bias is not None and bias.shape != (rows,)):
            raise ValueError(
                f"a weight of shape {weight.shape} does not match inputs of shape {tuple(inputs.shape)}"
                f"{'' if bias is None else f' and a bias of shape {tuple(bias.shape)}'}. Pass inputs (tokens, {columns}) "
                f"and a bias ({rows},)."
            )


@cache
def kernel() -> Kernel | None:
    """Return the kernel with the best instruction set of this CPU; None, with one warning, if it cannot be loaded."""
    try:
        library = load(LIBRARY)
    except OSError as error:
        logging.getLogger(__name__).warning(
            "ranking weights takes four times as long, and pruned models run as slowly as dense ones, because the "
            "sparse kernel cannot be loaded: %s. Build it with `python -m layerwise.sparse.build`, which needs a C++ "
            "compiler.",
            error,
        )
        return None
    return Kernel(library, LEVELS[library.layerwise_level()])


def load(path: Path) -> ctypes.CDLL:
    """Load a library built from ``build.SOURCES``. Load it after torch, so that both share OpenMP threads.

    Raises:
        OSError: the file does not exist, is for another system, or was built from other sources.
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
    library.layerwise_levels.argtypes = [number, number, integer, integer, address, integer, *[address] * 3]
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
