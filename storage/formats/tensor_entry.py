"""Where one tensor lies in a file, and what its bytes must be."""

import math
from dataclasses import dataclass

import torch

# The dtype names of the safetensors format, without its types of less than a byte.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Type, shape and place of one tensor.

    Args:
        dtype: name of the safetensors format, such as "BF16".
        shape: as in torch; ``()`` is a scalar.
        offset: of the first byte, from the beginning of the file.
        digest: xxh3_128 of the bytes, 32 hex digits; None where nobody has computed it yet.

    Raises:
        ValueError: if the dtype is unknown, or a number is negative.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in TORCH_DTYPES:
            raise ValueError(
                f"the tensor type {self.dtype!r} is not one of {sorted(TORCH_DTYPES)}. "
                "Convert the file to one of these first."
            )
        if any(type(number) is not int or number < 0 for number in (*self.shape, self.offset)):
            raise ValueError(
                f"a tensor of shape {self.shape} at offset {self.offset} cannot exist: sizes and offsets are "
                "whole numbers from zero on. The header or manifest it came from is damaged: write it again."
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def to_json(self) -> list[object]:
        """The entry as plain JSON: ``[dtype, shape, offset, digest]``."""
        return [self.dtype, list(self.shape), self.offset, self.digest]

    @classmethod
    def from_json(cls, row: list) -> "TensorEntry":
        """The entry that ``to_json`` wrote.

        Raises:
            ValueError: if ``row`` is something else.
        """
        dtype, shape, offset, digest = row
        return cls(dtype, tuple(shape), offset, digest)
