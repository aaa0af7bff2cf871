"""Files of a checkpoint folder: the ones an import copies, the ones that identify it, and the tensors in them."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from layerwise.storage.formats.large_file_pointer import refuse_pointers
from layerwise.storage.formats.safetensors_header import read_header
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.tasks.sources.folder import Folder

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Marks a compressed checkpoint, see layerwise.tasks.compressed.file_format.
DESCRIPTION_FILE = "compressed.json"
SPARSITY_FILE = "sparsity.json"  # of an exported checkpoint: its plan, and the sparsity of every linear
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    # Vocabulary files that only one tokenizer class of transformers 5 uses.
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "*.spm",
    "tekken.json",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
SUBFOLDERS = ("additional_chat_templates",)  # transformers reads no other subfolders
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.h5", "*.msgpack")
NOT_THE_MODEL = re.compile(
    r"(consolidated|adapter_model).*|.*\.(fp16|bf16|fp32|int8|int4)(-\d+-of-\d+)?\.safetensors"
)


@dataclass(frozen=True)
class QuantizedWeight:
    """The two stored tensors of a quantized weight.

    Attributes:
        settings: the quantization's entry of config.json.
    """

    values_name: str
    values: "StoredTensor"
    scales_name: str
    scales: "StoredTensor"
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class StoredTensor:
    """Position of a tensor in a safetensors file of the folder.

    Attributes:
        quantized: the stored tensors of a weight that has to be dequantized; ``entry`` then describes the result.
    """

    file: str
    entry: TensorEntry
    quantized: QuantizedWeight | None = None


def copied_files(names: Iterable[str]) -> list[str]:
    """Return the configuration, tokenizer and processor files among ``names``. An import copies them byte for byte.

    Files with a suffix of pickles are excluded, whatever the rest of the name is, because a user might open the copy.
    """
    wanted = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, *PROCESSOR_FILES)
    return sorted(name for name in names if _matches(name, wanted) and not _matches(name, PICKLES))


def identifying_files(folder: Folder) -> list[str]:
    """Return all files that affect the result of an import. A changed README, for example, does not.

    Raises:
        BrokenLink: if one of them is a symbolic link without a target.
    """
    names = {*folder.files, *folder.broken}
    weights = [name for name in names if name == INDEX or name.endswith(".safetensors")]
    found = sorted({*copied_files(names), *weights})
    if broken := [name for name in found if name in folder.broken]:
        raise folder.broken[broken[0]]
    return found


def require_files(folder: Folder) -> None:
    """Refuse a folder with broken links, or with Git LFS pointers in place of files.

    Weights that do not belong to the model, such as ``consolidated.safetensors``, may be pointers.

    Raises:
        BrokenLink: names the link.
        ValueError: names the pointer.
    """
    needed = [name for name in identifying_files(folder) if not NOT_THE_MODEL.fullmatch(name)]
    refuse_pointers(
        folder.fs,
        {folder.path(name): folder.files[name].size for name in needed},
        {folder.path(name): f"{name} of {folder.name}" for name in needed},
    )


def stored_tensors(folder: Folder) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint by its name in the files. Reads headers only.

    Raises:
        ValueError: the folder has no safetensors files, or shards are missing.
        Corrupt: a file contradicts its own header.
    """
    if INDEX in folder.files and SINGLE not in folder.files:  # transformers also prefers the single file
        return _sharded(folder)
    file = _only_file(folder)
    return {
        name: StoredTensor(file, entry) for name, entry in read_header(folder.fs, folder.path(file)).items()
    }


def _sharded(folder: Folder) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(folder.read(INDEX))["weight_map"]
        file_of: dict[str, str] = {name: str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{INDEX} of {folder.name} has no valid weight_map ({error!r}). Copy the file again, or save "
            "the model again with save_pretrained."
        ) from error
    shards = sorted(set(file_of.values()))
    if missing := [shard for shard in shards if shard not in folder.files]:
        tensors = sorted(name for name, shard in file_of.items() if shard in missing)
        raise ValueError(
            f"{folder.name} lacks {len(missing)} of the {len(shards)} shards that {INDEX} lists: "
            f"{_some(missing)} (with {_some(tensors)}). Copy or download the missing files."
        )
    headers = {shard: read_header(folder.fs, folder.path(shard)) for shard in shards}
    if absent := sorted(name for name, shard in file_of.items() if name not in headers[shard]):
        raise ValueError(
            f"{INDEX} of {folder.name} lists {_some(absent)} in {_some([file_of[absent[0]]])}, but the file does "
            "not contain it. The index and the shards are from different saves. Copy all of them again from one place."
        )
    return {name: StoredTensor(shard, headers[shard][name]) for name, shard in file_of.items()}


def _only_file(folder: Folder) -> str:
    if SINGLE in folder.files:
        return SINGLE
    if DESCRIPTION_FILE in folder.files:
        raise ValueError(
            f"{folder.name} is a compressed checkpoint: its weights are stored without their zeros. Unpack it with "
            "layerwise.tasks.compressed.checkpoint.unpack_checkpoint, and give the new folder."
        )
    found = sorted(
        name for name in folder.files if name.endswith(".safetensors") and not NOT_THE_MODEL.fullmatch(name)
    )
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{folder.name} has {len(found)} safetensors files ({_some(found)}) but neither {INDEX} nor "
            f"{SINGLE}, so the files of the model are not known. Add the index, or save the model again "
            "with save_pretrained."
        )
    if ggufs := sorted(name for name in folder.files if name.endswith(".gguf")):
        raise ValueError(
            f"{folder.name} has no safetensors files, but it has {_some(ggufs)}. Give the path or URL of one .gguf "
            "file instead of the folder (hf://owner/name/file.gguf on the hub)."
        )
    if pickles := sorted(name for name in folder.files if _matches(name, PICKLES)):
        raise ValueError(
            f"{folder.name} has its weights in {_some(pickles)}: pickle files and similar formats can run code when "
            'they are opened, and are not read. Convert them if you trust them: python -c "from transformers import '
            "AutoModelForCausalLM as M; M.from_pretrained('SOURCE', dtype='auto').save_pretrained('NEW')\". Copy the "
            "tokenizer files into NEW, and give NEW."
        )
    raise ValueError(
        f"{folder.name} has no *.safetensors file (it has {_some(sorted(folder.files))}). Give the folder "
        "that save_pretrained wrote."
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
