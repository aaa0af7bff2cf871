"""GGUF file as a transformers model: configuration, tokenizer and weights, one tensor in memory at a time.

Names and layouts come from the tables of transformers' own GGUF loader. Weights are not read by that loader, because it
holds the whole model in float32.
"""

import json
import re
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from layerwise.models.skeleton import UnsupportedModel, expected_tensors, layer_prefix
from layerwise.storage.formats.tensor_entry import TensorEntry, dtype_name
from layerwise.tasks.models.checkpoint_index import CheckpointIndex, IndexedTensor
from layerwise.tasks.models.gguf_header import check_gguf_header
from layerwise.tasks.models.tensor_matching import layers_stored
from layerwise.tasks.models.tokenizer import open_gguf_tokenizer
from layerwise.tasks.sources.checkpoint_files import CONFIG, GENERATION_CONFIG
from layerwise.tasks.sources.model_config import built, check_values, outline, short_reason

DTYPE = torch.bfloat16  # of dequantized weights; GGUF blocks are far less precise


class GgufWeights:
    """Model in a GGUF file.

    Attributes:
        config: configuration that transformers derives from the metadata.
        model: the model on the meta device.

    Raises:
        ValueError: it is not a GGUF file, or transformers cannot read its architecture.
        UnsupportedModel: it is a mixture of experts or an encoder-decoder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        self._architecture = _architecture(self._reader, path)
        document = _document(path)
        place = f"the metadata of {path.name}"
        check_values(document, place, layers_stored(tensor.name for tensor in self._reader.tensors))
        self.model = built(outline, document, place)
        self.config: PretrainedConfig = self.model.config
        self.config.architectures = [type(self.model).__name__]
        self.config.dtype = DTYPE
        self._processor: TensorProcessor = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(
            config=document
        )
        self._check_complete()

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by state-dict name."""
        return expected_tensors(self.model)

    def tensor(self, model_name: str) -> Tensor:
        """Dequantize one weight, in the layout of the model.

        Raises:
            ValueError: its type cannot be dequantized, or its shape does not match the configuration.
        """
        stored = self._stored[model_name]
        extra: dict[str, Any] = {"tensors": {}}  # GPT-2's processor puts the head here
        try:
            dequantized = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{stored.name} in {self.path.name} is stored as {stored.tensor_type.name}, which cannot be dequantized. "
                "Use a file in another format (Q8_0, F16, BF16), or the model's safetensors."
            ) from error
        processed = self._processor.process(
            weights=dequantized,
            name=stored.name,
            tensor_key_mapping=self._model_name_of,
            parsed_parameters=extra,
        )
        weight = extra["tensors"].get(model_name)
        if weight is None:
            weight = torch.from_numpy(np.require(processed.weights, requirements=["C", "W"]))
        if tuple(weight.shape) != self.expected[model_name]:
            raise ValueError(
                f"{stored.name} in {self.path.name} has the shape {tuple(weight.shape)}, but the "
                f"metadata ask for {self.expected[model_name]} as {model_name}. The file is damaged or unusual; use "
                "the model's safetensors."
            )
        return weight.to(DTYPE)

    @cached_property
    def index(self) -> CheckpointIndex:
        """Index of the dequantized weights; files and offsets have no meaning yet."""
        prefix = layer_prefix(self.model)
        number = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
        tensors = [
            IndexedTensor(
                name,
                name,
                int(match[1]) if (match := number.match(name)) else None,
                self.path.name,
                TensorEntry(dtype_name(DTYPE), shape, 0),
            )
            for name, shape in self.expected.items()
        ]
        document = json.loads(self.config.to_json_string())
        document["torch_dtype"] = document["dtype"]  # its name in transformers before version 5
        num_layers = self.config.get_text_config().num_hidden_layers
        return CheckpointIndex(document, prefix, num_layers, in_place=False, tensors=tuple(tensors))

    def small_files(self) -> dict[str, bytes]:
        """Return configuration and tokenizer files by name, as ``save_pretrained`` writes them."""
        generation = GenerationConfig.from_model_config(self.config)
        files = {
            CONFIG: json.dumps(self.index.config, indent=2, sort_keys=True).encode(),
            GENERATION_CONFIG: generation.to_json_string().encode(),
        }
        with tempfile.TemporaryDirectory() as folder:
            open_gguf_tokenizer(self.path).save_pretrained(folder)
            files |= {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
        return files

    @property
    def license(self) -> str | None:
        """Licence that the file names, e.g. "apache-2.0"."""
        found = _metadata(self._reader, "general.license")
        return found if isinstance(found, str) and found else None

    @cached_property
    def _model_name_of(self) -> dict[str, str]:
        """State-dict names by GGUF name."""
        names: dict[str, str] = get_gguf_hf_weights_map(_Names(self.model), self._processor)
        return names

    @cached_property
    def _stored(self) -> dict[str, Any]:
        return {
            self._model_name_of[tensor.name]: tensor
            for tensor in self._reader.tensors
            if tensor.name in self._model_name_of
        }

    def _check_complete(self) -> None:
        if missing := sorted(set(self.expected) - set(self._stored)):
            raise ValueError(
                f"{self.path.name} lacks {len(missing)} of the {len(self.expected)} tensors of a "
                f"{self.config.model_type} model: {', '.join(missing[:5])}. Download the file again, all "
                "parts of it if it is split, or use the model's safetensors."
            )


class _Names:
    """The part of a model that ``get_gguf_hf_weights_map`` reads, down to the base model.

    With the model itself, that function rebuilds its tables for each submodule, which takes minutes for a large model.
    """

    def __init__(self, module: nn.Module, depth: int = 1) -> None:
        self.module, self.depth = module, depth
        self.config = getattr(module, "config", None)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, "_Names"]]:
        children = self.module.named_children() if self.depth else []
        return [(name, _Names(child, self.depth - 1)) for name, child in children]


def _open(path: Path) -> GGUFReader:
    try:
        check_gguf_header(path)
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path.name} cannot be read as GGUF ({short_reason(error)}): it is damaged, truncated or not a GGUF file. "
            "Download it again."
        ) from error


def _document(path: Path) -> dict[str, Any]:
    """Return the configuration that transformers derives from the metadata.

    Raises:
        ValueError: transformers cannot use the metadata.
    """
    try:
        document: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    except MemoryError:
        raise
    except Exception as error:  # transformers trusts the metadata, so any error is possible
        raise ValueError(
            f"the metadata of {path.name} cannot be used: {short_reason(error)}. Download the file again, or use the "
            "model's safetensors."
        ) from error
    document.pop("_model_name_or_path", None)
    return document


def _architecture(reader: GGUFReader, path: Path) -> str:
    architecture = _metadata(reader, "general.architecture")
    if not isinstance(architecture, str):
        raise ValueError(
            f"general.architecture of {path.name} is {architecture!r}, so the type of the model is unknown. Download "
            "the file again."
        )
    if experts := _metadata(reader, f"{architecture}.expert_count"):
        raise UnsupportedModel(
            f"{path.name} is a mixture of experts ({architecture} with {experts} experts), which is not read from GGUF. Use "
            "the model's safetensors."
        )
    readable = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
    if architecture not in readable:
        raise ValueError(
            f"{path.name} has the GGUF architecture {architecture!r}, which transformers cannot read (it "
            f"reads {', '.join(readable)}). Use the model's safetensors instead."
        )
    return architecture


def _metadata(reader: GGUFReader, name: str) -> object:
    field = reader.get_field(name)
    return field.contents() if field else None
