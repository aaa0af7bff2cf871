"""Tokenizer of a model: its files, its identity, and how it is opened without running code that comes with it."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from xxhash import xxh3_128_hexdigest

from layerwise.storage.formats.canonical_json import digest
from layerwise.tasks.sources.checkpoint_files import CONFIG, GENERATION_CONFIG, copied_files
from layerwise.tasks.sources.folder import Folder
from layerwise.tasks.sources.model_config import short_reason
from layerwise.tasks.sources.model_source import DemoSource, FolderSource, GgufSource, HubSource, find_source

# Entries of config.json by which transformers chooses the class of a tokenizer.
CHOOSE_THE_CLASS = ("model_type", "tokenizer_class")
FAST_TOKENIZER = "tokenizer.json"  # the tokenizers library can read this file without any other
# Start of a protobuf message whose first field has a length; tiktoken's files consist of lines of text.
SENTENCEPIECE_START = b"\n"


@dataclass(frozen=True)
class TokenizerFiles:
    """Configuration and tokenizer files of a model.

    Attributes:
        source: name of the model, for errors.
        contents: contents by file name.
    """

    source: str
    contents: Mapping[str, bytes]

    @property
    def identity(self) -> str:
        """See ``tokenizer_identity``."""
        return tokenizer_identity(
            {name: xxh3_128_hexdigest(content) for name, content in self.contents.items()}
        )

    @property
    def encoding_identity(self) -> str:
        """See ``encoding_identity``."""
        return encoding_identity(self.identity, json.loads(self.contents[CONFIG]))

    def load(self) -> PreTrainedTokenizerBase:
        """Open the tokenizer.

        Raises:
            ValueError: see ``open_tokenizer``.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.contents.items():
                Path(folder, name).parent.mkdir(exist_ok=True)
                Path(folder, name).write_bytes(content)
            return open_tokenizer(folder, self.source)


def tokenizer_identity(digests: Mapping[str, str]) -> str:
    """Return a digest of the files that decide how text becomes tokens.

    Args:
        digests: digests of a model's files by name; files that do not belong to the tokenizer are ignored.
    """
    names = set(copied_files(digests)) - {CONFIG, GENERATION_CONFIG}
    return digest({name: digests[name] for name in sorted(names)})


def encoding_identity(files_identity: str, config: Mapping[str, Any]) -> str:
    """Return a digest of everything that decides the token ids of a text.

    From the same files transformers builds different tokenizers for different types of models: next to a configuration
    of Qwen2 some texts get other ids than next to one of LLaMA.

    Args:
        files_identity: see ``tokenizer_identity``.
        config: content of ``config.json``.
    """
    return digest({"files": files_identity, **{name: config.get(name) for name in CHOOSE_THE_CLASS}})


def tokenizer_of_source(model: str) -> TokenizerFiles:
    """Read the tokenizer files of a model that is not imported, as an import would copy them. Reads no weights.

    Args:
        model: see ``find_source``.

    Raises:
        ValueError: as ``import_checkpoint``.
        OSError: as ``import_checkpoint``.
    """
    source = find_source(model)
    match source:
        case FolderSource():
            return _of_folder(source.label, source.folder)
        case HubSource():
            return _of_folder(source.label, source.open())
        case GgufSource() | DemoSource():
            # gguf is slow to import, and only these sources need it.
            from layerwise.tasks.models.gguf_weights import GgufWeights

            return TokenizerFiles(source.label, GgufWeights(source.local_gguf()).small_files())


def _of_folder(label: str, folder: Folder) -> TokenizerFiles:
    return TokenizerFiles(label, {name: folder.read(name) for name in copied_files(folder.files)})


def open_tokenizer(folder: str | os.PathLike, name: str) -> PreTrainedTokenizerBase:
    """Open the tokenizer in a local folder.

    Args:
        folder: holds the tokenizer's files and ``config.json``; the files may be links.
        name: name of the model, for errors.

    Raises:
        ValueError: the tokenizer is missing or damaged, or needs a package that is not installed or code that comes
            with it.
    """
    files = sorted(path.name for path in Path(folder).iterdir())
    own = [file for file in files if file not in (CONFIG, GENERATION_CONFIG)]
    if not own:
        raise ValueError(
            f"{name} has no tokenizer (it has {', '.join(files) or 'no files'}). Copy tokenizer.json and "
            "tokenizer_config.json next to the weights and import again."
        )
    _require_packages(Path(folder), own, name)
    return _opened(folder, name, f"its files: {', '.join(own)}")


def open_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer in the metadata of a GGUF file.

    Raises:
        ValueError: the file has no tokenizer that transformers can open.
    """
    return _opened(path.parent, path.name, "read from the file's metadata", gguf_file=path.name)


def _opened(folder: str | os.PathLike, name: str, origin: str, **options: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **options
        )
        tokenizer("text")  # some values are only read now
    except BaseException as error:  # for foreign files the libraries raise many kinds of exceptions
        # PanicException of the tokenizers library does not derive from Exception.
        panicked = type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or panicked):
            raise
        own_code = "trust_remote_code" in str(error)
        reason = "it needs code that comes with it, which is never run" if own_code else short_reason(error)
        raise ValueError(
            f"{name} has no tokenizer that transformers can open ({reason}; {origin}). Copy tokenizer.json and "
            "tokenizer_config.json from the source of the model next to the weights, and import again."
        ) from error
    return tokenizer


def _require_packages(folder: Path, files: list[str], name: str) -> None:
    """Name the missing packages of a tokenizer without ``tokenizer.json``; transformers names the wrong ones."""
    if FAST_TOKENIZER in files:
        return
    for file in files:
        if file.endswith(".model"):
            with (folder / file).open("rb") as opened:
                packages = ["sentencepiece"] if opened.read(1) == SENTENCEPIECE_START else ["tiktoken"]
            packages += ["protobuf"] if packages == ["sentencepiece"] else []
        elif file.endswith(".tiktoken"):
            packages = ["tiktoken"]
        else:
            continue
        modules = {"protobuf": "google.protobuf"}
        missing = [package for package in packages if not _is_installed(modules.get(package, package))]
        if missing:
            raise ValueError(
                f"the tokenizer of {name} is {file}, which transformers reads with packages that are not installed. "
                f"Install them (pip install {' '.join(missing)}), or copy a tokenizer.json next to the weights."
            )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
