"""The files of a compressed checkpoint: what stands in them for a sparse weight, and how they describe themselves."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from reprlib import Repr
from typing import Literal

from torch import Tensor

from layerwise.sparse import bitmask, semi_structured

DESCRIPTION_FILE = "compressed.json"
FORMAT, VERSION = "layerwise-compressed", 1
# The only names that files with tensors have. A folder may come from anybody: a name with a path in it would read and
# write files elsewhere.
TENSOR_FILE = re.compile(r"compressed-[0-9]{5,9}-of-[0-9]{5,9}\.safetensors")
# The 2:4 layout stores two of four whatever they are; a weight that happens to be zero must not cost it its place,
# but a weight that is far sparser (1:4) is smaller as a bitmask.
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
    """A weight for which two tensors stand: one with ``.mask`` or ``.metadata`` after its name, one with ``.values``.

    Attributes:
        file: that both are in.
        shape: of the dense weight.
        dtype: of the dense weight and of its values, e.g. "bfloat16".

    Raises:
        ValueError: a value that no compressed weight has.
    """

    file: str
    shape: tuple[int, int]
    dtype: str
    layout: Layout

    def __post_init__(self) -> None:
        if not isinstance(self.layout, str) or self.layout not in PARTS:
            raise ValueError(
                f"a weight in {shortened(self.file)} has the layout {shortened(self.layout)}, and known are "
                f"{sorted(PARTS)}. Use the version of layerwise that wrote it."
            )
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(
                f"a weight in {shortened(self.file)} has the dtype {shortened(self.dtype)}, and known are {DTYPES}"
            )
        if not (
            isinstance(self.shape, tuple)
            and len(self.shape) == 2
            and all(type(size) is int and size > 0 for size in self.shape)
        ):
            raise ValueError(
                f"a weight in {shortened(self.file)} has the shape {shortened(self.shape)}, which is not two whole "
                "numbers above zero"
            )


@dataclass(frozen=True)
class Description:
    """What ``compressed.json`` says.

    Attributes:
        files: all files with tensors, in order.
        tensors: the weights that are not stored as they are, by name.
        sizes: bytes with and without zeros, for people.

    Raises:
        ValueError: files that no compressed checkpoint has, a file that is named twice, or a weight in none of them.
    """

    files: tuple[str, ...]
    tensors: Mapping[str, SparseTensor]
    sizes: Mapping[str, float]

    def __post_init__(self) -> None:
        for file in self.files:
            if not isinstance(file, str) or not TENSOR_FILE.fullmatch(file):
                raise ValueError(
                    f"{shortened(file)} is not the name of a file with tensors: these are called "
                    "compressed-00001-of-00002.safetensors, and lie in the folder itself"
                )
        if not self.files or len(set(self.files)) < len(self.files):
            raise ValueError(f"the files {shortened(self.files)} are not one or more different ones")
        for name, sparse in self.tensors.items():
            if sparse.file not in self.files:
                raise ValueError(
                    f"{shortened(name)} is in {shortened(sparse.file)}, which is not one of the files"
                )

    def to_json(self) -> bytes:
        """The file; ``read_description`` reads it back."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1).encode()


def description_of(content: bytes) -> Description:
    """What the content of a ``compressed.json`` says; every value in it is checked.

    Raises:
        ValueError: it is of a format that this version does not know, or says what cannot be.
    """
    try:
        document = json.loads(content, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _require_keys(document, ("format", "version", "files", "tensors", "sizes"), "it")
    known = document["format"], document["version"]
    if known != (FORMAT, VERSION):
        raise ValueError(
            f"it has format {shortened(known[0])}, version {shortened(known[1])}, and this one reads {FORMAT!r}, "
            f"version {VERSION}"
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
        raise ValueError("it has a name twice")
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
    """A foreign value as errors show it: on one line, and not longer than that."""
    return SHORT.repr(value)


def parts_of(name: str, layout: Layout) -> list[str]:
    """Names of the two tensors that stand for the weight ``name``."""
    return [f"{name}.{part}" for part in PARTS[layout]]


def compressed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """What is stored for a weight: two tensors, or itself if they would not be smaller."""
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
    """The dense weight.

    Args:
        first: the mask or the metadata.

    Raises:
        ValueError: the parts do not belong together, or are not of the weight that ``sparse`` describes.
        TypeError: they have other dtypes.
    """
    if sparse.layout == "bitmask":
        return bitmask.unpack(packed_weight(sparse, first, values))
    weight = semi_structured.unpack(semi_structured.SemiStructuredWeight(values, first))
    rows, columns = weight.shape
    _require_described(sparse, (rows, columns), weight)
    return weight


def packed_weight(sparse: SparseTensor, mask: Tensor, values: Tensor) -> bitmask.PackedWeight:
    """The weight as it is stored; ``sparse`` has the layout "bitmask". Errors are those of ``restored``."""
    packed = bitmask.PackedWeight(sparse.shape, mask, values)
    _require_described(sparse, packed.shape, values)
    return packed


def _require_described(sparse: SparseTensor, shape: tuple[int, int], values: Tensor) -> None:
    if shape != sparse.shape or str(values.dtype) != f"torch.{sparse.dtype}":
        raise ValueError(
            f"the parts in {sparse.file} make a {values.dtype} weight of shape {shape}, but "
            f"{DESCRIPTION_FILE} says {sparse.dtype} of shape {sparse.shape}. The files are of different folders: copy "
            "all of them again from one place."
        )
