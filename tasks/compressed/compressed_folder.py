"""Open the folder of a compressed checkpoint, and check everything in it before it is used.

The folder may come from anybody, like any checkpoint on a hub. Its description may be damaged, incomplete, or written to
make the reader access files elsewhere.
"""

import json
import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from layerwise.models.experts import fused_tensors
from layerwise.models.skeleton import build_skeleton
from layerwise.sparse import semi_structured
from layerwise.sparse.bitmask import PackedWeight
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.formats.safetensors_header import read_header
from layerwise.storage.formats.tensor_entry import DTYPE_NAMES, TensorEntry
from layerwise.storage.tensors import read_entries
from layerwise.tasks.compressed.file_format import (
    PARTS,
    TENSOR_FILE,
    Description,
    SparseTensor,
    description_of,
    packed_weight,
    parts_of,
    restored,
    shortened,
)
from layerwise.tasks.models.tensor_matching import layers_stored, match_tensors
from layerwise.tasks.models.weight_conversion import StoredNames, parameter_names
from layerwise.tasks.sources.checkpoint_files import (
    CONFIG,
    DESCRIPTION_FILE,
    SPARSITY_FILE,
    SUBFOLDERS,
    StoredTensor,
    copied_files,
)
from layerwise.tasks.sources.file_identity import FileState
from layerwise.tasks.sources.folder import Folder
from layerwise.tasks.sources.model_config import (
    check_values,
    config_from_document,
    outline_from_document,
    read_config_document,
)

TORCH_NAMES = {name: getattr(torch, name) for name in DTYPE_NAMES}
LONGEST_DESCRIPTION = 100_000_000  # bytes, as for the header of a safetensors file
LARGEST_SIZE = 1 << 48  # limit of a tensor's dimension, so that torch's 64-bit sizes do not overflow
COPY_AGAIN = "Copy all files of the folder again from one place."


def model_names(
    stored: Mapping[str, StoredTensor], document: Mapping[str, Any], folder: str
) -> dict[str, str]:
    """Return the names of the model's parameters by the names of the stored tensors.

    Args:
        document: content of ``config.json``.
        folder: name of the folder, for errors.

    Raises:
        ValueError: the tensors do not match the configuration, or hold several parameters or a part of one.
    """
    outline = outline_from_document(document, folder)
    matched, converted = match_tensors(stored, outline, folder)
    conversions = StoredNames(stored, outline).conversions if converted else ()
    try:
        return parameter_names(matched, conversions, fused_tensors(outline))
    except ValueError as error:
        raise ValueError(
            f"{folder} is not a compressed checkpoint that this version of layerwise reads: {error}."
        ) from error


class CompressedFolder:
    """A compressed checkpoint on a local disk that is complete according to its description and its file headers.

    The weights match ``config.json``, as for an imported checkpoint (``layerwise.tasks.models.tensor_matching``).
    Mask and values of a weight are compared only when they are read.

    Attributes:
        folder: files of the folder.
        description: content of ``compressed.json``.
        config: configuration of the model.
        model: the model on the meta device.
        model_names: names in the model's state dict, by names in the files; without the tensors that the model does
            not use. Experts have linears of their own.
        copied: names of the files that an ordinary checkpoint also has.

    Raises:
        ValueError: the folder is not a compressed checkpoint, is damaged or incomplete, or has a link that leads out
            of it.
    """

    def __init__(self, folder: str | PathLike) -> None:
        self.folder = _listed(Path(folder))
        self.description = _described(self.folder)
        for name in (*self.description.files, CONFIG, SPARSITY_FILE):
            if name not in self.folder.files:
                raise ValueError(
                    f"{self.folder.name} lacks {name}, one of the files of a compressed checkpoint "
                    f"({DESCRIPTION_FILE} lists {len(self.description.files)} files with tensors). {COPY_AGAIN}"
                )
        self.copied = (*copied_files(self.folder.files), SPARSITY_FILE)
        self._headers = {file: self._header(file) for file in self.description.files}
        stored = self._dense_tensors()
        self._check_sizes(stored)
        document = read_config_document(self.folder)
        check_values(document, f"{CONFIG} of {self.folder.name}", layers_stored(stored))
        # Compares names and shapes before any memory of the sizes in the configuration is allocated.
        self.model_names = model_names(stored, document, self.folder.name)
        self.config = config_from_document(document, self.folder.name)
        self.model = build_skeleton(deepcopy(self.config))

    def files(self) -> Iterator[tuple[str, dict[str, Tensor | PackedWeight]]]:
        """Yield every file with tensors, with its weights by name. Weights of the layout bitmask stay packed.

        Raises:
            ValueError: the tensors of a weight do not belong together, or a file cannot be read.
        """
        for file, header in self._headers.items():
            sparse = {name: each for name, each in self.description.tensors.items() if each.file == file}
            parts = {part for name, each in sparse.items() for part in parts_of(name, each.layout)}
            weights: dict[str, Tensor | PackedWeight] = {
                name: self._read(file, name) for name in header if name not in parts
            }
            for name, each in sparse.items():
                first, values = (self._read(file, part) for part in parts_of(name, each.layout))
                read = packed_weight if each.layout == "bitmask" else restored
                weights[name] = read(each, first, values)
            yield file, weights

    def _header(self, file: str) -> dict[str, TensorEntry]:
        try:
            header = read_header(self.folder.fs, self.folder.path(file))
        except Corrupt as error:
            raise ValueError(str(error)) from error
        for name, entry in header.items():
            if any(size >= LARGEST_SIZE for size in entry.shape):
                raise ValueError(
                    f"the header of {file} in {self.folder.name} gives {shortened(name)} the shape "
                    f"{shortened(entry.shape)}, which is too large for a tensor. {COPY_AGAIN}"
                )
        return header

    def _read(self, file: str, name: str) -> Tensor:
        # One tensor at a time: views of a common buffer would keep all of it in memory.
        try:
            entries = {name: self._headers[file][name]}
            return read_entries(self.folder.fs, self.folder.path(file), entries)[name]
        except Corrupt as error:
            raise ValueError(str(error)) from error

    def _dense_tensors(self) -> dict[str, StoredTensor]:
        """Return an entry for every weight as it is with its zeros. The offsets are not used."""
        sparse = self.description.tensors
        dense = {name: self._dense_tensor(name, each) for name, each in sparse.items()}
        parts = {part for name, each in sparse.items() for part in parts_of(name, each.layout)}
        for file, header in self._headers.items():
            for name, entry in header.items():
                if name in parts and file == sparse[name.rpartition(".")[0]].file:
                    continue
                if name in dense or name in parts:
                    raise ValueError(
                        f"{self.folder.name} has two tensors for {shortened(name)}. {COPY_AGAIN}"
                    )
                dense[name] = StoredTensor(file, entry)
        for name in dense:
            weight, _, part = name.rpartition(".")
            if part in PARTS["bitmask"] + PARTS["semi_structured"] and weight.endswith(".weight"):
                raise ValueError(
                    f"{self.folder.name} has the tensor {shortened(name)}, a part of a weight that {DESCRIPTION_FILE} "
                    f"does not list. {COPY_AGAIN}"
                )
        return dense

    def _dense_tensor(self, name: str, sparse: SparseTensor) -> StoredTensor:
        header, (rows, columns) = self._headers[sparse.file], sparse.shape
        first, values = parts_of(name, sparse.layout)
        if missing := [part for part in (first, values) if part not in header]:
            raise ValueError(
                f"{sparse.file} of {self.folder.name} lacks the tensor {shortened(missing[0])}. {COPY_AGAIN}"
            )
        dtype = DTYPE_NAMES[sparse.dtype]
        if sparse.layout == "bitmask":
            fits = (header[first].dtype, header[first].shape) == ("U8", (rows, -(-columns // 8)))
            fits = fits and len(header[values].shape) == 1 and header[values].shape[0] <= rows * columns
        else:
            fits = (header[first].dtype, header[first].shape) == ("I16", (rows, columns // 16))
            fits = fits and columns % 16 == 0 and header[values].shape == (rows, columns // 2)
            fits = fits and TORCH_NAMES[sparse.dtype] in semi_structured.DTYPES
        if not fits or header[values].dtype != dtype:
            found = " and ".join(
                f"{header[part].dtype} {shortened(list(header[part].shape))}" for part in (first, values)
            )
            raise ValueError(
                f"{DESCRIPTION_FILE} of {self.folder.name} says that {shortened(name)} is {sparse.dtype} of shape "
                f"{shortened(list(sparse.shape))} in the layout {sparse.layout}, but its parts "
                f"({' and '.join(PARTS[sparse.layout])}) in {sparse.file} are {found}. {COPY_AGAIN}"
            )
        return StoredTensor(sparse.file, TensorEntry(dtype, sparse.shape, 0))

    def _check_sizes(self, dense: Mapping[str, StoredTensor]) -> None:
        """Refuse files whose total size differs from the description: some of them are from another folder."""
        found = {
            "dense bytes": sum(each.entry.nbytes for each in dense.values()),
            "compressed bytes": sum(
                entry.nbytes for header in self._headers.values() for entry in header.values()
            ),
        }
        for name, size in found.items():
            if (said := self.description.sizes.get(name)) != size:
                raise ValueError(
                    f"{DESCRIPTION_FILE} of {self.folder.name} says {shortened(said)} {name}, but the files have "
                    f"{size}: tensors were added or are missing. {COPY_AGAIN}"
                )


def _listed(folder: Path) -> Folder:
    """List the files of ``folder``. Links are followed if their targets are in the folder.

    The hub's cache is an exception: its snapshots are folders of links to ``blobs`` next to ``snapshots``, which has
    only files of the same repository. A compressed checkpoint that was downloaded from the hub is stored this way.
    """
    root = Path(os.path.realpath(folder))
    if not root.is_dir():
        raise ValueError(
            f"{folder} is not a folder, so it is not a compressed checkpoint. Give a folder that `layerwise compress` "
            "wrote, copied to a local disk."
        )
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    places = [root, *(root / name for name in SUBFOLDERS if (root / name).is_dir())]
    found = [Path(entry.path) for place in places for entry in os.scandir(place) if entry.is_file()]
    present = {str(path.relative_to(root)): path for path in found}
    used = {DESCRIPTION_FILE, SPARSITY_FILE, *copied_files(present)}
    files = {}
    for name, path in sorted(present.items()):
        target = Path(os.path.realpath(path))
        if (name in used or TENSOR_FILE.fullmatch(name)) and not any(map(target.is_relative_to, inside)):
            raise ValueError(
                f"{name} of {folder} is a link to {target}, outside of the folder. It is not followed, because a "
                "foreign folder could use it to read any file. Replace the link by the file."
            )
        status = path.stat()
        files[name] = FileState(status.st_size, str(status.st_mtime_ns))
    # pinned: the folder is read at once and not kept open, so changes need not be noticed.
    return Folder(LocalFileSystem(), str(root), str(folder), files, pinned=True)


def _described(folder: Folder) -> Description:
    if DESCRIPTION_FILE not in folder.files:
        raise ValueError(
            f"{folder.name} has no {DESCRIPTION_FILE}, so it is not a compressed checkpoint. Give a folder that "
            "`layerwise compress` wrote, copied to a local disk. Load an ordinary checkpoint with transformers."
        )
    if folder.files[DESCRIPTION_FILE].size > LONGEST_DESCRIPTION:
        raise ValueError(
            f"{DESCRIPTION_FILE} of {folder.name} has {folder.files[DESCRIPTION_FILE].size} bytes, more than the limit "
            f"of {LONGEST_DESCRIPTION}. Copy it again."
        )
    try:
        return description_of(folder.read(DESCRIPTION_FILE))
    except ValueError as error:
        text = (
            str(error)
            if not isinstance(error, json.JSONDecodeError | UnicodeError)
            else "it is not valid JSON"
        )
        raise ValueError(
            f"{folder.name}/{DESCRIPTION_FILE} cannot be used: {text}. Copy it again, or use the version of layerwise "
            "that wrote it."
        ) from error
