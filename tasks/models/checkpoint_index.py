"""Index of a checkpoint: its configuration, and the place of each of its tensors."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.tasks.sources.checkpoint_files import QuantizedWeight

# Entries of config.json that describe its origin, not the model.
NOT_THE_MODEL = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class IndexedTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: name in its safetensors file.
        model_name: name in the state dict of the model; None if the model does not use the tensor.
        layer: number of its decoder layer; None for a tensor outside of the layers.
        copy_of: for an unused tensor, the name of the stored tensor that the model ties it to.
        part_of: for a tensor that transformers converts, the name of the conversion (``Conversion.target``); such a tensor
            has no ``model_name``.
        quantized: place of a weight that an import dequantizes; ``entry`` then describes the result.
    """

    name: str
    model_name: str | None
    layer: int | None
    file: str
    entry: TensorEntry
    copy_of: str | None = None
    part_of: str | None = None
    quantized: QuantizedWeight | None = None

    @property
    def is_used(self) -> bool:
        """Whether the model computes with the values."""
        return self.model_name is not None or self.part_of is not None

    def to_json(self) -> dict[str, Any]:
        """Return the tensor as plain JSON. Fields that were added later are left out if unused."""
        assert self.quantized is None, "an import stores dequantized weights"
        plain = {name: value for name, value in vars(self).items() if name not in ("part_of", "quantized")}
        added = {} if self.part_of is None else {"part_of": self.part_of}
        return {**plain, "entry": self.entry.to_json(), **added}


@dataclass(frozen=True)
class ConvertedWeight:
    """One weight of the model that is made from stored tensors.

    Attributes:
        name: name in the state dict of the model.
        made_by: name of the conversion, see ``IndexedTensor.part_of``.
        layer: number of its decoder layer; None outside of the layers.
        entry: dtype and shape; the weight has no place in a file.
    """

    name: str
    made_by: str
    layer: int | None
    entry: TensorEntry

    @property
    def model_name(self) -> str:
        return self.name


ModelWeight = IndexedTensor | ConvertedWeight


@dataclass(frozen=True)
class CheckpointIndex:
    """Configuration and tensors of a checkpoint, in the order of the files. Tied tensors are stored once."""

    config: dict[str, Any]  # content of config.json
    layer_prefix: str  # e.g. "model.layers"
    num_layers: int
    in_place: bool  # the tensors are in the source folder, not in the artifact
    tensors: tuple[IndexedTensor, ...]
    converted: tuple[ConvertedWeight, ...] = ()
    shared: Mapping[str, str] = field(
        default_factory=dict
    )  # weights of several layers: state-dict name of the stored one

    def layer_tensors(self, index: int) -> dict[str, ModelWeight]:
        """Return the weights of one decoder layer by their name inside it, e.g. ``self_attn.q_proj.weight``.

        A weight that layers share is stored once, and its ``layer`` may be another one.
        """
        start = f"{self.layer_prefix}.{index}."
        of_layer = self.weights(index)
        if self.shared:
            every = {name: weight for layer in self.groups for name, weight in self.weights(layer).items()}
            of_layer |= {name: every[stored] for name, stored in self.shared.items()}
        return {
            name.removeprefix(start): weight for name, weight in of_layer.items() if name.startswith(start)
        }

    def outer_tensors(self) -> dict[str, ModelWeight]:
        """Return the weights outside of the decoder layers (embeddings, final norm, head) by state-dict name."""
        return self.weights(None)

    @property
    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights outside of the decoder layers, by state-dict name."""
        return {name: tuple(weight.entry.shape) for name, weight in self.outer_tensors().items()}

    def weights(self, layer: int | None) -> dict[str, ModelWeight]:
        """Return the weights of one decoder layer, or those outside of the layers, by state-dict name."""
        stored = {tensor.model_name: tensor for tensor in self.groups[layer] if tensor.model_name is not None}
        return stored | {weight.name: weight for weight in self.converted if weight.layer == layer}

    def stored_tensors(self, weights: Iterable[ModelWeight]) -> list[IndexedTensor]:
        """Return all stored tensors that ``weights`` consist of or are made from."""
        weights = list(weights)
        conversions = {weight.made_by for weight in weights if isinstance(weight, ConvertedWeight)}
        sources = [tensor for name in conversions for tensor in self._sources[name]]
        return [weight for weight in weights if isinstance(weight, IndexedTensor)] + sources

    @cached_property
    def _sources(self) -> dict[str, list[IndexedTensor]]:
        """Inputs of the conversions."""
        found: dict[str, list[IndexedTensor]] = defaultdict(list)
        for tensor in self.tensors:
            if tensor.part_of is not None:
                found[tensor.part_of].append(tensor)
        return found

    @cached_property
    def groups(self) -> dict[int | None, list[IndexedTensor]]:
        """All tensors, including unused ones, by decoder layer; ``None`` is the key of those outside."""
        groups: dict[int | None, list[IndexedTensor]] = defaultdict(list)
        for tensor in self.tensors:
            groups[tensor.layer].append(tensor)
        return groups

    @property
    def may_have_experts(self) -> bool:
        """Whether a weight of a decoder layer has three dimensions, as weights of experts and convolutions, or a name of experts."""
        weights: list[ModelWeight] = [*self.tensors, *self.converted]
        return any(
            len(each.entry.shape) > 2 or "experts" in (each.model_name or "").split(".")
            for each in weights
            if each.layer is not None
        )

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of the tensors that the model uses, for each layer."""
        return tuple(
            sum(tensor.entry.nbytes for tensor in self.layer_tensors(index).values())
            for index in range(self.num_layers)
        )

    @property
    def outer_bytes(self) -> int:
        """Bytes of the tensors that the model uses outside of the layers."""
        return sum(tensor.entry.nbytes for tensor in self.outer_tensors().values())

    @property
    def dtype(self) -> str:
        """Torch dtype of most bytes of the decoder layers, e.g. "bfloat16"."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.layer is not None and tensor.is_used:
                sizes[str(tensor.entry.torch_dtype).removeprefix("torch.")] += tensor.entry.nbytes
        return sizes.most_common(1)[0][0]

    @property
    def parameters(self) -> int:
        """Number of weights of the model; tied weights count once."""
        return sum(t.entry.nbytes // t.entry.torch_dtype.itemsize for t in self.tensors if t.is_used)

    @property
    def identity(self) -> str:
        """Digest of the configuration and all tensors; it does not depend on how they are split into files."""
        assert all(tensor.entry.digest for tensor in self.tensors), (
            "only an imported checkpoint has an identity"
        )
        config = {name: value for name, value in self.config.items() if name not in NOT_THE_MODEL}
        tensors = sorted([t.name, t.entry.dtype, list(t.entry.shape), t.entry.digest] for t in self.tensors)
        return digest({"config": json.dumps(config, sort_keys=True), "tensors": tensors})

    def to_json(self) -> bytes:
        """Return the index as JSON; ``from_json`` reads it."""
        document = {
            "config": self.config,
            "layer_prefix": self.layer_prefix,
            "num_layers": self.num_layers,
            "layer_bytes": self.layer_bytes,
            "outer_bytes": self.outer_bytes,
            "in_place": self.in_place,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }
        if self.converted:
            document["converted"] = [
                {**vars(weight), "entry": weight.entry.to_json()} for weight in self.converted
            ]
        if self.shared:
            document["shared"] = self.shared
        return json.dumps(document, indent=1).encode()

    @staticmethod
    def from_json(content: bytes) -> "CheckpointIndex":
        """Read an index that ``to_json`` wrote."""
        document = json.loads(content)
        return CheckpointIndex(
            document["config"],
            document["layer_prefix"],
            document["num_layers"],
            document["in_place"],
            tuple(
                IndexedTensor(**{**plain, "entry": TensorEntry.from_json(plain["entry"])})
                for plain in document["tensors"]
            ),
            tuple(
                ConvertedWeight(**{**plain, "entry": TensorEntry.from_json(plain["entry"])})
                for plain in document.get("converted", ())
            ),
            document.get("shared", {}),
        )
