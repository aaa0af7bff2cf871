"""The tokenizer of a model: the files that decide how text becomes tokens, before and after the import."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128_hexdigest

from layerwise.storage.formats.canonical_json import digest
from layerwise.tasks.models.tokenizer import open_tokenizer
from layerwise.tasks.sources.checkpoint_files import CONFIG, GENERATION_CONFIG, copied_files
from layerwise.tasks.sources.folder import Folder
from layerwise.tasks.sources.model_source import DemoSource, FolderSource, GgufSource, HubSource, find_source

# Entries of config.json by which transformers chooses the class of a tokenizer.
CHOOSE_THE_CLASS = ("model_type", "tokenizer_class")


@dataclass(frozen=True)
class TokenizerFiles:
    """The small files of a model: configuration and tokenizer.

    Attributes:
        source: name of the model, for errors.
        contents: by file name.
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
        """The tokenizer.

        Raises:
            ValueError: see ``open_tokenizer``.
        """
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.contents.items():
                Path(folder, name).parent.mkdir(exist_ok=True)
                Path(folder, name).write_bytes(content)
            return open_tokenizer(folder, self.source)


def tokenizer_identity(digests: Mapping[str, str]) -> str:
    """Digest of the files that decide how text becomes tokens.

    Args:
        digests: of all files of a model, by name; those of other files have no part in it.
    """
    names = set(copied_files(digests)) - {CONFIG, GENERATION_CONFIG}
    return digest({name: digests[name] for name in sorted(names)})


def encoding_identity(files_identity: str, config: Mapping[str, Any]) -> str:
    """Digest of all that decides the token ids of a text.

    With the same files transformers makes another tokenizer for another type of model: next to a configuration of
    Qwen2 some texts get other ids than next to one of LLaMA.

    Args:
        files_identity: see ``tokenizer_identity``.
        config: the content of ``config.json``.
    """
    return digest({"files": files_identity, **{name: config.get(name) for name in CHOOSE_THE_CLASS}})


def tokenizer_of_source(model: str) -> TokenizerFiles:
    """The tokenizer of a model that is not imported, as an import would copy it. No weights are read.

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
            from layerwise.tasks.models.gguf_weights import (
                GgufWeights,  # gguf takes its time, and only these sources need it
            )

            return TokenizerFiles(source.label, GgufWeights(source.local_gguf()).small_files())


def _of_folder(label: str, folder: Folder) -> TokenizerFiles:
    return TokenizerFiles(label, {name: folder.read(name) for name in copied_files(folder.files)})
