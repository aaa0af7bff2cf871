"""The format of compressed checkpoints: how sparse weights are stored, and the files that describe them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from reprlib import Repr
from typing import Literal

from torch import Tensor

from layerwise.sparse import bitmask, semi_structured
from layerwise.tasks.sources.checkpoint_files import DESCRIPTION_FILE

FORMAT, VERSION = "layerwise-compressed", 1
# Valid names of files with tensors. The folder may come from anybody, and a name that contains a path would read and
# write files elsewhere.
TENSOR_FILE = re.compile(r"compressed-[0-9]{5,9}-of-[0-9]{5,9}\.safetensors")
# The 2:4 layout always stores two of four values. It is used up to this size relative to the bitmask: a few further
# zeros must not rule it out, but a far sparser weight (1:4) is smaller as a bitmask.
TOLERATED_EXCESS = 1.01

SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 200  # characters

Layout = Literal["bitmask", "semi_structured"]
PARTS: Mapping[Layout, tuple[str, str]] = {
    "bitmask": ("mask", "values"),
    "semi_structured": ("metadata", "values"),
}
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in bitmask.BITS_OF)


@dataclass(frozen=True)
class SparseTensor:
    """A weight that is stored as two tensors: ``<name>.mask`` or ``<name>.metadata``, and ``<name>.values``.

    Attributes:
        file: file that contains both.
        shape: shape of the dense weight.
        dtype: dtype of the dense weight and of its values, e.g. "bfloat16".

    Raises:
        ValueError: a value is not valid.
    """

    file: str
    shape: tuple[int, int]
    dtype: str
    layout: Layout

    def __post_init__(self) -> None:
        if not isinstance(self.layout, str) or self.layout not in PARTS:
            raise ValueError(
                f"a weight in {shortened(self.file)} has the layout {shortened(self.layout)}, which is not one of "
                f"{sorted(PARTS)}. Use the version of layerwise that wrote it."
            )
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(
                f"a weight in {shortened(self.file)} has the dtype {shortened(self.dtype)}, which is not one of {DTYPES}"
            )
        if not (
            isinstance(self.shape, tuple)
            and len(self.shape) == 2
            and all(type(size) is int and size > 0 for size in self.shape)
        ):
            raise ValueError(
                f"a weight in {shortened(self.file)} has the shape {shortened(self.shape)}, which is not two positive "
                "whole numbers"
            )


@dataclass(frozen=True)
class Description:
    """The content of ``compressed.json``.

    Attributes:
        files: all files with tensors, in order.
        tensors: the weights that are stored without zeros, by name.
        sizes: bytes with and without zeros.

    Raises:
        ValueError: a file name is not valid, a file is listed twice, or the file of a weight is not listed.
    """

    files: tuple[str, ...]
    tensors: Mapping[str, SparseTensor]
    sizes: Mapping[str, float]

    def __post_init__(self) -> None:
        for file in self.files:
            if not isinstance(file, str) or not TENSOR_FILE.fullmatch(file):
                raise ValueError(
                    f"{shortened(file)} is not a valid name of a file with tensors, such as "
                    "compressed-00001-of-00002.safetensors"
                )
        if not self.files or len(set(self.files)) < len(self.files):
            raise ValueError(f"the list of files {shortened(self.files)} is empty or has duplicates")
        for name, sparse in self.tensors.items():
            if sparse.file not in self.files:
                raise ValueError(
                    f"{shortened(name)} is in {shortened(sparse.file)}, which is not in the list of files"
                )

    def to_json(self) -> bytes:
        """Return the content of the file; ``description_of`` parses it."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1).encode()


def description_of(content: bytes) -> Description:
    """Parse the content of a ``compressed.json``, and check every value.

    Raises:
        ValueError: the format is unknown to this version, or a value is not valid.
    """
    try:
        document = json.loads(content, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _require_keys(document, ("format", "version", "files", "tensors", "sizes"), "it")
    known = document["format"], document["version"]
    if known != (FORMAT, VERSION):
        raise ValueError(
            f"it has format {shortened(known[0])}, version {shortened(known[1])}, but this version of layerwise reads "
            f"{FORMAT!r}, version {VERSION}"
        )
    tensors = {}
    for name, row in _object(document["tensors"], "tensors").items():
        _require_keys(row, ("file", "shape", "dtype", "layout"), shortened(name))
        shape = tuple(row["shape"]) if isinstance(row["shape"], list) else row["shape"]
        tensors[name] = SparseTensor(row["file"], shape, row["dtype"], row["layout"])
    files = document["files"]
    if not isinstance(files, list):
        raise ValueError(f"its files are {shortened(files)}, not a list")
    return Description(tuple(files), tensors, _object(document["sizes"], "sizes"))


def _without_repeats(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a duplicate name")
    return found


def _object(value: object, name: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"its {name} are {shortened(value)}, not an object")
    return value


def _require_keys(document: object, keys: Sequence[str], name: str) -> None:
    if not isinstance(document, dict) or set(document) != set(keys):
        found = sorted(document) if isinstance(document, dict) else document
        raise ValueError(f"{name} has {shortened(found)}, not {', '.join(keys)}")


def shortened(value: object) -> str:
    """Return a value from outside in a form that is short enough for a message."""
    return SHORT.repr(value)


def parts_of(name: str, layout: Layout) -> list[str]:
    """Return the names of the two tensors that store the weight ``name``."""
    return [f"{name}.{part}" for part in PARTS[layout]]


def compressed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Compress a weight into two tensors; return the weight itself if they would not be smaller."""
    if weight.ndim != 2 or weight.dtype not in bitmask.BITS_OF:
        return {name: weight}
    packed = bitmask.pack(weight)
    if packed.nbytes >= weight.nbytes:
        return {name: weight}
    if semi_structured.is_semi_structured(weight):
        half = semi_structured.pack(weight)
        if half.nbytes <= TOLERATED_EXCESS * packed.nbytes:
            return dict(zip(parts_of(name, "semi_structured"), (half.metadata, half.values), strict=True))
    return dict(zip(parts_of(name, "bitmask"), (packed.mask, packed.values), strict=True))


def restored(sparse: SparseTensor, first: Tensor, values: Tensor) -> Tensor:
    """Restore the dense weight.

    Args:
        first: the mask or the metadata.

    Raises:
        ValueError: the two tensors do not belong together, or do not match ``sparse``.
        TypeError: a tensor has a wrong dtype.
    """
    if sparse.layout == "bitmask":
        return bitmask.unpack(packed_weight(sparse, first, values))
    weight = semi_structured.unpack(semi_structured.SemiStructuredWeight(values, first))
    rows, columns = weight.shape
    _require_described(sparse, (rows, columns), weight)
    return weight


def packed_weight(sparse: SparseTensor, mask: Tensor, values: Tensor) -> bitmask.PackedWeight:
    """Return a weight of the layout "bitmask" packed as it is stored. Raises the errors of ``restored``."""
    packed = bitmask.PackedWeight(sparse.shape, mask, values)
    _require_described(sparse, packed.shape, values)
    return packed


def _require_described(sparse: SparseTensor, shape: tuple[int, int], values: Tensor) -> None:
    if shape != sparse.shape or str(values.dtype) != f"torch.{sparse.dtype}":
        raise ValueError(
            f"the tensors in {sparse.file} are a {values.dtype} weight of shape {shape}, but {DESCRIPTION_FILE} says "
            f"{sparse.dtype} of shape {sparse.shape}. The files are from different folders. Copy all of them again "
            "from one place."
        )


# COMPRESSED.md: the format, for people who find the folder without having this package.
LAYOUT_FILE = "COMPRESSED.md"

LAYOUT_TEXT = """# A checkpoint without its zeros

This folder was written by layerwise, in format `layerwise-compressed`, version 1. `config.json` and the tokenizer files
are those of the model. The tensors are in the files `compressed-*.safetensors`, which `compressed.json` lists under
`files`. Most tensors are stored unchanged. A pruned weight `X` that is smaller without its zeros is stored as two
tensors. For each such weight, `compressed.json` has an entry under `tensors` with the `shape` (rows, columns), the
`dtype`, the `file` that contains both tensors, and the `layout`.

Layout `bitmask`:

- `X.mask`, uint8, shape (rows, ceil(columns / 8)): bit `k % 8` (bit 0 is the lowest) of byte `k // 8` of a row is 1 if
  weight `k` of that row is stored. The bits beyond the last column are 0.
- `X.values`, dtype of X, one-dimensional: the stored weights, row by row.

Layout `semi_structured`, for float16 and bfloat16 weights with at most two stored weights in every group of four in a
row ("2:4"):

- `X.values`, dtype of X, shape (rows, columns / 2): the two stored weights of every four.
- `X.metadata`, int16, shape (rows, columns / 16): the positions of the two weights, four bits for every four weights, in
  the order that the kernels of CUTLASS read.

These two tensors are the `packed` and `meta` of torch's tensors for 2:4 sparsity. On a GPU with such kernels in torch,
`SparseSemiStructuredTensorCUTLASS(shape, values, metadata, None, None, None)` can replace the weight.

A weight is stored unless all its bits are zero. -0.0 is therefore stored, and all weights are restored bit for bit.

This code reads all weights, with their zeros, as a state dict:

```python
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.sparse import SparseSemiStructuredTensorCUTLASS


def read_weights(folder):
    description = json.loads((Path(folder) / "compressed.json").read_text())
    weights = {}
    for file in description["files"]:
        if not re.fullmatch(r"compressed-[0-9]+-of-[0-9]+\\.safetensors", file):
            raise ValueError(f"{file!r} is not a file of this folder")
        weights |= load_file(Path(folder) / file)
    for name, sparse in description["tensors"].items():
        shape, values = torch.Size(sparse["shape"]), weights.pop(f"{name}.values")
        if sparse["layout"] == "bitmask":
            bits = weights.pop(f"{name}.mask")[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
            stored = bits.flatten(1)[:, : shape[1]].bool()
            weights[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(stored, values)
        else:
            parts = values, weights.pop(f"{name}.metadata"), None, None, None
            weights[name] = SparseSemiStructuredTensorCUTLASS(shape, *parts).to_dense()
    return weights
```
"""
