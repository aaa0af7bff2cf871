"""The files of a compressed checkpoint: what stands in them for a sparse weight, and how they describe themselves."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from layerwise import bitmask, semi_structured

DESCRIPTION_FILE = "compressed.json"
FORMAT, VERSION = "layerwise-compressed", 1
# The 2:4 layout stores two of four whatever they are; a weight that happens to be zero must not cost it its place,
# but a weight that is far sparser (1:4) is smaller as a bitmask.
TOLERATED_EXCESS = 1.01

Layout = Literal["bitmask", "semi_structured"]
PARTS: Mapping[Layout, tuple[str, str]] = {
    "bitmask": ("mask", "values"),
    "semi_structured": ("metadata", "values"),
}


@dataclass(frozen=True)
class SparseTensor:
    """A weight for which two tensors stand: one with ``.mask`` or ``.metadata`` after its name, one with ``.values``.

    Attributes:
        file: that both are in.
        shape: of the dense weight.
        dtype: of the dense weight and of its values, e.g. "bfloat16".

    Raises:
        ValueError: a layout that is not known.
    """

    file: str
    shape: tuple[int, int]
    dtype: str
    layout: Layout

    def __post_init__(self) -> None:
        if self.layout not in PARTS:
            raise ValueError(
                f"a weight in {self.file} has the layout {self.layout!r}, and known are {sorted(PARTS)}. Use the "
                "version of layerwise that wrote it."
            )


@dataclass(frozen=True)
class Description:
    """What ``compressed.json`` says.

    Attributes:
        files: all files with tensors, in order.
        tensors: the weights that are not stored as they are, by name.
        sizes: bytes with and without zeros, for people.
    """

    files: tuple[str, ...]
    tensors: Mapping[str, SparseTensor]
    sizes: Mapping[str, float]

    def to_json(self) -> bytes:
        """The file; ``read_description`` reads it back."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1).encode()


def read_description(folder: Path) -> Description:
    """What the compressed checkpoint in ``folder`` says of itself.

    Raises:
        ValueError: there is none, or of a format that this version does not know.
    """
    try:
        text = (folder / DESCRIPTION_FILE).read_text()
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no {DESCRIPTION_FILE}, so it is no compressed checkpoint. Give a folder that the stage "
            "compress wrote, copied to a local disk; transformers itself loads an ordinary one."
        ) from error
    try:
        return _described(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / DESCRIPTION_FILE} cannot be used ({error!r}). Copy it again, or use the version of layerwise "
            "that wrote it."
        ) from error


def _described(document: dict) -> Description:
    known = document["format"], document["version"]
    if known != (FORMAT, VERSION):
        raise ValueError(
            f"it has format {known[0]!r}, version {known[1]!r}, and this one reads {FORMAT!r}, version {VERSION}"
        )
    rows = document["tensors"].items()
    tensors = {name: SparseTensor(**{**row, "shape": tuple(row["shape"])}) for name, row in rows}
    return Description(tuple(document["files"]), tensors, document["sizes"])


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
