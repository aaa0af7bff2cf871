"""A GGUF file as a transformers model: configuration, tokenizer and weights, one tensor in memory at a time.

Names and layouts are those of transformers' own GGUF loader, whose tables are used here. That loader holds
the whole model in float32.
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

DTYPE = torch.bfloat16  # of the weights after dequantizing: GGUF blocks hold far less precision than that


class GgufWeights:
    """The model in a GGUF file.

    Attributes:
        config: the configuration transformers gives it.
        model: the model on the meta device.

    Raises:
        ValueError: if it is no GGUF file, or of an architecture that transformers does not read.
        UnsupportedModel: if it is a mixture of experts or an encoder-decoder.
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
        """State-dict name and shape of every weight."""
        return expected_tensors(self.model)

    def tensor(self, model_name: str) -> Tensor:
        """One weight, dequantized, in the layout of the model.

        Raises:
            ValueError: if its shape does not fit the configuration.
        """
        stored = self._stored[model_name]
        extra: dict[str, Any] = {"tensors": {}}  # where GPT-2's processor puts the head
        try:
            dequantized = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{stored.name} in {self.path.name} is stored as {stored.tensor_type.name}, which is not dequantized. "
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
                f"{stored.name} in {self.path.name} has the shape {tuple(weight.shape)}, but its metadata "
                f"ask for {self.expected[model_name]} as {model_name}. The file is damaged or unusual; use "
                "the safetensors."
            )
        return weight.to(DTYPE)

    @cached_property
    def index(self) -> CheckpointIndex:
        """Every weight as it will be after dequantizing; files and offsets mean nothing yet."""
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
        document["torch_dtype"] = document["dtype"]  # the name that transformers had for it before version 5
        num_layers = self.config.get_text_config().num_hidden_layers
        return CheckpointIndex(document, prefix, num_layers, in_place=False, tensors=tuple(tensors))

    def small_files(self) -> dict[str, bytes]:
        """Configuration and tokenizer files such as ``save_pretrained`` writes them."""
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
        """What the file says of its licence, e.g. "apache-2.0"."""
        found = _metadata(self._reader, "general.license")
        return found if isinstance(found, str) and found else None

    @cached_property
    def _model_name_of(self) -> dict[str, str]:
        """GGUF name -> state-dict name."""
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
    """What ``get_gguf_hf_weights_map`` asks of a model, down to the base model.

    Given the model itself it makes its tables again for each of its submodules: minutes for a large model.
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
            f"{path.name} cannot be read as GGUF ({short_reason(error)}): it is damaged, truncated or something else. "
            "Download it again."
        ) from error


def _document(path: Path) -> dict[str, Any]:
    """The configuration that transformers makes of the metadata.

    Raises:
        ValueError: whatever transformers raises because of their values.
    """
    try:
        document: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    except MemoryError:
        raise
    except Exception as error:  # transformers believes the metadata
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
            f"{path.name} has {architecture!r} for general.architecture, so that it is not known which model it is. "
            "Download it again."
        )
    if experts := _metadata(reader, f"{architecture}.expert_count"):
        raise UnsupportedModel(
            f"{path.name} is a mixture of experts ({architecture} with {experts} experts); experts that see "
            "few calibration tokens need a treatment that layerwise does not have. Use a dense model."
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
