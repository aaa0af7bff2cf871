"""Tensor entries: type, shape and place of a tensor in a file, and the digest of its bytes."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing torch takes seconds; commands that only list a store do without it
    import torch

# The dtypes of the safetensors format, except those of less than a byte: name in torch, bytes per element.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
DTYPE_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}  # by the name in torch


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the safetensors name of a torch dtype.

    Raises:
        KeyError: the format has no such type.
    """
    return DTYPE_NAMES[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class TensorEntry:
    """Type, shape and place of one tensor in a file.

    Attributes:
        dtype: name of the safetensors format, such as "BF16".
        shape: as in torch; ``()`` is a scalar.
        offset: of the first byte, from the beginning of the file.
        digest: xxh3_128 of the bytes, 32 hex digits; None if it has not been computed.

    Raises:
        ValueError: the dtype is unknown, or a number is negative.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"the tensor type {self.dtype!r} is not one of {sorted(DTYPES)}. "
                "Convert the file to one of these first."
            )
        if any(type(number) is not int or number < 0 for number in (*self.shape, self.offset)):
            raise ValueError(
                f"a tensor of shape {self.shape} at offset {self.offset} cannot exist: sizes and offsets are "
                "non-negative integers. The header or manifest that describes it is damaged: write the file again."
            )

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype][0])
        return dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]

    def to_json(self) -> list[object]:
        """Return the entry as plain JSON: ``[dtype, shape, offset, digest]``."""
        return [self.dtype, list(self.shape), self.offset, self.digest]

    @classmethod
    def from_json(cls, row: list) -> "TensorEntry":
        """Return the entry that ``to_json`` wrote.

        Raises:
            ValueError: ``row`` is not such an entry.
        """
        dtype, shape, offset, digest = row
        return cls(dtype, tuple(shape), offset, digest)
