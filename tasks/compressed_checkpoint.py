"""Read a compressed checkpoint: as a transformers model, dense or packed, or written out again with its zeros."""

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layerwise.bitmask import PackedWeight, pack, unpack
from layerwise.skeleton import build_skeleton, expected_tensors
from layerwise.sparse.accelerate import Acceleration, accelerate
from tasks.checkpoint_files import CONFIG, GENERATION_CONFIG, INDEX, copied_files
from tasks.compressed_format import packed_weight, parts_of, read_description, restored
from tasks.export import SPARSITY_FILE
from tasks.model_config import config_from_document
from tasks.tensor_matching import aliases


def load(folder: str | PathLike) -> PreTrainedModel:
    """The model in ``folder``, in the dtype it is stored in, with its zeros, on the CPU.

    Raises:
        ValueError: no compressed checkpoint, or parts of it are missing or do not belong together.
    """
    folder = Path(folder)
    weights = {name: weight for _, tensors in _dense_files(folder) for name, weight in tensors.items()}
    config = _config(folder)
    model_class: Any = type(build_skeleton(deepcopy(config)))
    model, found = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype="auto", output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(
            f"{folder} has no weights for {sorted(found['missing_keys'])}, which transformers would have filled with "
            "random ones. Copy all of its files again from one place."
        )
    assert isinstance(model, PreTrainedModel)
    return _with_generation_config(model, folder)


def load_packed(folder: str | PathLike, int8: bool = False) -> tuple[PreTrainedModel, Acceleration]:
    """The model in ``folder`` with its sparse linears packed as they are stored: for generating text on a CPU.

    What ``layerwise.sparse.accelerate.accelerate`` would leave dense is unpacked; nothing else ever is.

    Args:
        int8: see ``accelerate``.

    Returns:
        The model, and which of its linears run packed.

    Raises:
        ValueError: no compressed checkpoint, or parts of it are missing or do not belong together.
    """
    folder = Path(folder)
    model = build_skeleton(_config(folder))
    expected = expected_tensors(model)
    dense: dict[str, Tensor] = {}
    packed: dict[str, PackedWeight] = {}
    for _, tensors in _files(folder):
        for stored, weight in tensors.items():
            name = next((alias for alias in aliases(stored, model) if alias in expected), stored)
            if isinstance(weight, Tensor):
                dense[name] = weight
            elif isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D):  # stored transposed
                packed[name] = pack(unpack(weight).T)
            else:
                packed[name] = weight
    if missing := sorted(expected.keys() - dense.keys() - packed.keys()):
        raise ValueError(
            f"{folder} has no weights for {missing}. Copy all of its files again from one place."
        )
    model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()
    done = accelerate(model, int8, packed)
    return _with_generation_config(model, folder), done


def unpack_checkpoint(folder: str | PathLike, out: str | PathLike) -> None:
    """Write the checkpoint in ``folder`` into a new folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    One file after the other: never more than one decoder layer is in memory. The weights are those that were
    compressed, bit for bit. Without the model card, which tells how to load the compressed files.

    Raises:
        ValueError: no compressed checkpoint, parts of it are missing or do not belong together, or ``out`` is not
            empty.
    """
    folder, out = Path(folder), Path(out)
    read_description(folder)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty, and files of two checkpoints must not mix. Give a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    place: dict[str, str] = {}
    size = 0
    for file, tensors in _dense_files(folder):
        name = file.replace("compressed-", "model-", 1)
        save_file(tensors, out / name, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, name)
        size += sum(weight.nbytes for weight in tensors.values())
    for name in (*copied_files(path.name for path in folder.iterdir()), SPARSITY_FILE):
        shutil.copyfile(folder / name, out / name)
    # Last: without it nobody takes a folder that is not finished for a checkpoint.
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
    (out / INDEX).write_text(json.dumps(index, indent=2))


def _config(folder: Path) -> PretrainedConfig:
    read_description(folder)  # refuses what is no compressed checkpoint
    return config_from_document(json.loads((folder / CONFIG).read_text()), str(folder))


def _with_generation_config(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    if (folder / GENERATION_CONFIG).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _dense_files(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The files with tensors, each with its weights as they were before they were compressed."""
    for file, tensors in _files(folder):
        yield (
            file,
            {
                name: unpack(each) if isinstance(each, PackedWeight) else each
                for name, each in tensors.items()
            },
        )


def _files(folder: Path) -> Iterator[tuple[str, dict[str, Tensor | PackedWeight]]]:
    """The files with tensors, each with its weights; bitmasks are left packed."""
    description = read_description(folder)
    for file in description.files:
        if not (folder / file).exists():
            raise ValueError(
                f"{folder} lacks {file}, one of its {len(description.files)} files. Copy it again."
            )
        tensors: dict[str, Any] = load_file(folder / file)
        for name, sparse in description.tensors.items():
            if sparse.file == file:
                try:
                    parts = [tensors.pop(part) for part in parts_of(name, sparse.layout)]
                except KeyError as error:
                    raise ValueError(
                        f"{folder / file} lacks the tensor {error}. Copy the file again."
                    ) from None
                read = packed_weight if sparse.layout == "bitmask" else restored
                tensors[name] = read(sparse, *parts)
        yield file, tensors
