"""Which files of a folder make up a checkpoint, and where each of its tensors lies."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from layerwise.storage.formats.large_file_pointer import refuse_pointers
from layerwise.storage.formats.safetensors_header import read_header
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.tasks.compressed.file_format import DESCRIPTION_FILE
from layerwise.tasks.sources.folder import Folder

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
    # Vocabularies of single tokenizers of transformers 5, apart from the names above.
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "*.spm",
    "tekken.json",
)
SUBFOLDERS = ("additional_chat_templates",)  # the only ones that transformers reads anything from
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npy", "*.h5", "*.msgpack")
NOT_THE_MODEL = re.compile(
    r"(consolidated|adapter_model).*|.*\.(fp16|bf16|fp32|int8|int4)(-\d+-of-\d+)?\.safetensors"
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a safetensors file of the folder."""

    file: str
    entry: TensorEntry


def copied_files(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are configuration or tokenizer files: an import copies them byte for byte.

    Never a file that might be a pickle, whatever it is called before its suffix: someone might open it.
    """
    wanted = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)
    return sorted(name for name in names if _matches(name, wanted) and not _matches(name, PICKLES))


def identifying_files(folder: Folder) -> list[str]:
    """All files that decide what an import gives; a changed README does not import a model anew.

    Raises:
        BrokenLink: if one of them is a link that leads to nothing.
    """
    names = {*folder.files, *folder.broken}
    weights = [name for name in names if name == INDEX or name.endswith(".safetensors")]
    found = sorted({*copied_files(names), *weights})
    if broken := [name for name in found if name in folder.broken]:
        raise folder.broken[broken[0]]
    return found


def require_files(folder: Folder) -> None:
    """Refuse a folder in which links lead to nothing, or Git LFS has left pointers in place of files.

    Weights that are not the model's, such as ``consolidated.safetensors``, may be pointers.

    Raises:
        BrokenLink: naming the link.
        ValueError: naming the pointer.
    """
    needed = [name for name in identifying_files(folder) if not NOT_THE_MODEL.fullmatch(name)]
    refuse_pointers(
        folder.fs,
        {folder.path(name): folder.files[name].size for name in needed},
        {folder.path(name): f"{name} of {folder.name}" for name in needed},
    )


def stored_tensors(folder: Folder) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by its name in the files; reads headers only.

    Raises:
        ValueError: for a folder without safetensors (naming pickle files), or with shards missing.
        Corrupt: for a file that contradicts its own header.
    """
    if INDEX in folder.files and SINGLE not in folder.files:  # transformers, too, prefers the single file
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
            f"{INDEX} of {folder.name} has no readable weight_map ({error!r}). Copy the file again, or save "
            "the model again with save_pretrained."
        ) from error
    shards = sorted(set(file_of.values()))
    if missing := [shard for shard in shards if shard not in folder.files]:
        tensors = sorted(name for name, shard in file_of.items() if shard in missing)
        raise ValueError(
            f"{folder.name} lacks {len(missing)} of the {len(shards)} shards that {INDEX} names: "
            f"{_some(missing)} (with {_some(tensors)}). Copy or download the missing files."
        )
    headers = {shard: read_header(folder.fs, folder.path(shard)) for shard in shards}
    if absent := sorted(name for name, shard in file_of.items() if name not in headers[shard]):
        raise ValueError(
            f"{INDEX} of {folder.name} places {_some(absent)} in {_some([file_of[absent[0]]])}, which does "
            "not hold it. Index and shards are from different saves: copy all of them again from one place."
        )
    return {name: StoredTensor(shard, headers[shard][name]) for name, shard in file_of.items()}


def _only_file(folder: Folder) -> str:
    if SINGLE in folder.files:
        return SINGLE
    if DESCRIPTION_FILE in folder.files:
        raise ValueError(
            f"{folder.name} is a compressed checkpoint, whose weights are stored without their zeros. Give the "
            "folder that layerwise.tasks.compressed.checkpoint.unpack_checkpoint makes of it."
        )
    found = sorted(
        name for name in folder.files if name.endswith(".safetensors") and not NOT_THE_MODEL.fullmatch(name)
    )
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{folder.name} has {len(found)} safetensors files ({_some(found)}) but neither {INDEX} nor "
            f"{SINGLE}, so it is not known which belong together. Add the index, or save the model again "
            "with save_pretrained."
        )
    if ggufs := sorted(name for name in folder.files if name.endswith(".gguf")):
        raise ValueError(
            f"{folder.name} has no safetensors but {_some(ggufs)}. Give the path or URL of one .gguf file "
            "instead of the folder (hf://owner/name/file.gguf on the hub)."
        )
    if pickles := sorted(name for name in folder.files if _matches(name, PICKLES)):
        raise ValueError(
            f"{folder.name} holds its weights as {_some(pickles)}: pickle files and their like can run code "
            'when opened and are not read. Convert them where you trust them: python -c "from transformers '
            "import AutoModelForCausalLM as M; M.from_pretrained('SOURCE', "
            "dtype='auto').save_pretrained('NEW')\", then give NEW (with the tokenizer files copied into "
            "it)."
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
