"""Read a compressed checkpoint: load it as a transformers model, dense or packed, or unpack it with its zeros."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from secrets import token_hex
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layerwise.sparse.accelerate import Acceleration, accelerate
from layerwise.sparse.bitmask import PackedWeight, pack, unpack
from layerwise.tasks.compressed.compressed_folder import CompressedFolder
from layerwise.tasks.models.model_in_folder import with_generation_config
from layerwise.tasks.sources.checkpoint_files import INDEX


def load(folder: str | PathLike) -> PreTrainedModel:
    """Load the model in ``folder`` with its zeros, in the stored dtype, on the CPU.

    Raises:
        ValueError: the folder is not a compressed checkpoint, or its files are incomplete or do not belong together.
    """
    compressed = CompressedFolder(folder)
    weights = {name: weight for _, tensors in _dense_files(compressed) for name, weight in tensors.items()}
    model_class: Any = type(compressed.model)
    model = model_class.from_pretrained(None, config=compressed.config, state_dict=weights, dtype="auto")
    assert isinstance(model, PreTrainedModel)
    return with_generation_config(model, compressed.folder)


def load_packed(folder: str | PathLike, int8: bool = False) -> tuple[PreTrainedModel, Acceleration]:
    """Load the model in ``folder`` with its sparse linears packed as they are stored, for generating text on a CPU.

    Only the weights that ``layerwise.sparse.accelerate.accelerate`` leaves dense are unpacked.

    Args:
        int8: see ``accelerate``.

    Returns:
        The model, and the linears that run packed.

    Raises:
        ValueError: the folder is not a compressed checkpoint, or its files are incomplete or do not belong together.
    """
    compressed = CompressedFolder(folder)
    model = compressed.model
    dense: dict[str, Tensor] = {}
    packed: dict[str, PackedWeight] = {}
    for _, tensors in compressed.files():
        for stored, weight in tensors.items():
            name = compressed.model_names.get(stored)
            if name is None:
                continue  # the model does not use this tensor
            if isinstance(weight, Tensor):
                dense[name] = weight
            elif isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D):  # stored transposed
                packed[name] = pack(unpack(weight).T)
            else:
                packed[name] = weight
    model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()
    done = accelerate(model, int8, packed)
    return with_generation_config(model, compressed.folder), done


def unpack_checkpoint(folder: str | PathLike, out: str | PathLike) -> None:
    """Write the checkpoint in ``folder`` into a new folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    The weights are bit for bit those that were compressed. Files are converted one at a time, so at most one decoder
    layer is in memory. The model card is not copied, because it explains how to load the compressed files.

    Args:
        out: new or empty folder. It is written completely, or left as it was.

    Raises:
        ValueError: ``folder`` is not a compressed checkpoint, its files are incomplete or do not belong together, or
            ``out`` is not empty.
    """
    compressed = CompressedFolder(folder)
    with _new_folder(Path(out)) as written:
        place: dict[str, str] = {}
        size = 0
        for file, tensors in _dense_files(compressed):
            name = file.replace("compressed-", "model-", 1)
            save_file(tensors, written / name, metadata={"format": "pt"})
            place |= dict.fromkeys(tensors, name)
            size += sum(weight.nbytes for weight in tensors.values())
        for name in compressed.copied:
            (written / name).parent.mkdir(exist_ok=True)
            # "x": on a case-insensitive disk, two names may be one file.
            with (written / name).open("xb") as copy:
                copy.write(compressed.folder.read(name))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
        (written / INDEX).write_text(json.dumps(index, indent=2))


def _dense_files(compressed: CompressedFolder) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every file with tensors, with its weights unpacked."""
    for file, tensors in compressed.files():
        yield (
            file,
            {
                name: unpack(each) if isinstance(each, PackedWeight) else each
                for name, each in tensors.items()
            },
        )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Create a folder next to ``out``; rename it to ``out`` at the end, or remove it after an error.

    Raises:
        ValueError: ``out`` is not a new or empty folder.
    """
    out = Path(os.path.realpath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = "not empty, and files of two checkpoints must not be mixed" if out.is_dir() else "a file"
        raise ValueError(f"{out} is {found}. Give a new folder.")
    if out.is_mount():
        raise ValueError(f"{out} is a mount point. Give a new folder in it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.parent / f".{out.name}.{token_hex(4)}"
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(out)  # replaces an empty folder; fails if files have been added to it
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
