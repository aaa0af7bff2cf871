"""Names and layouts of stored tensors, by the mapping with which transformers loads and saves them.

Most tensors are only renamed. Others are stored in another layout than the model's: several tensors make one weight, or
one makes several, by operations of transformers (merge, concatenate, split, transpose). The same operations, reversed,
give an export the names and the layout of its source.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from layerwise.tasks.models.checkpoint_index import ConvertedWeight, IndexedTensor, ModelWeight


@dataclass(frozen=True)
class ConvertedTensor:
    """A stored tensor that is an input of a conversion.

    Attributes:
        name: name in its file.
        renamed: name after renaming, to which the reversed operations return.
        pattern: source pattern of the operations that the name matches.
    """

    name: str
    renamed: str
    pattern: str


@dataclass(frozen=True)
class Conversion:
    """Operations that make weights of the model from stored tensors.

    Attributes:
        target: state-dict name of the first weight; identifies the conversion in a checkpoint.
        sources: in the order in which the operations take them.
        converter: the operations, as transformers defines them for this kind of model.
        model: the model on the meta device; some operations depend on its configuration.
    """

    target: str
    sources: tuple[ConvertedTensor, ...]
    converter: WeightConverter
    model: PreTrainedModel

    def weights(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights by state-dict name.

        Args:
            stored: the sources, by name in their files; other tensors are ignored.
        """
        # A copy, because it collects the tensors. Its type hints know only futures of them.
        converter: Any = deepcopy(self.converter)
        for source in self.sources:
            converter.add_tensor(self.target, source.name, source.pattern, stored[source.name])
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: _only(tensor) for name, tensor in made.items()}

    def stored(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sources that make ``weights``, by name in their files: the inverse of ``weights``."""
        converter: Any = self.converter.reverse_transform()
        key = ""
        for name in sorted(weights, key=dot_natural_key):
            key, pattern = converter.rename_source_key(name)
            converter.add_tensor(key, name, pattern, weights[name])
        made = converter.convert(key, model=self.model, config=self.model.config)
        prefix = f"{self.model.base_model_prefix}."  # the weights may have it where the sources do not
        tensors = {name.removeprefix(prefix): _only(tensor) for name, tensor in made.items()}
        names = {source.name: source.renamed.removeprefix(prefix) for source in self.sources}
        if missing := sorted(name for name in names.values() if name not in tensors):
            raise ValueError(
                f"the reversed conversion of {self.target} makes {', '.join(sorted(tensors)[:3])}, but not {missing[0]}"
            )
        return {source: tensors[name] for source, name in names.items()}


class StoredNames:
    """Meaning of the names of stored tensors in a model.

    Args:
        names: names in the files.
        model: the model on the meta device.

    Attributes:
        conversions: conversions of transformers whose inputs are among the tensors.
    """

    def __init__(self, names: Iterable[str], model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        inputs: dict[str, list[ConvertedTensor]] = {}
        self._aliases: dict[str, tuple[str, ...]] = {}
        # Some renamings depend on the names before, in the order of transformers; so does the order of merged tensors.
        for name in sorted(names, key=dot_natural_key):
            loaded_as, pattern = rename_source_key(name, renamings, converters, prefix, state)
            renamed, _ = rename_source_key(name, renamings, [])
            if pattern is not None and loaded_as in state:
                inputs.setdefault(loaded_as, []).append(ConvertedTensor(name, renamed, pattern))
            # A base model is saved without the prefix that it has in a language model, and the reverse.
            known_as = (loaded_as, renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}."))
            own = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            self._aliases[name] = tuple(dict.fromkeys((*known_as, *own)))
        self.conversions = tuple(
            Conversion(target, tuple(sources), by_pattern[sources[0].pattern], model)
            for target, sources in inputs.items()
        )

    def aliases(self, name: str) -> tuple[str, ...]:
        """Return the possible names in the model of a stored tensor, the name that transformers gives it first."""
        return self._aliases[name]


def weights_on_meta(conversion: Conversion, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a conversion on the meta device, after a check that an export can undo it.

    Args:
        stored: the sources on the meta device.

    Raises:
        ValueError: the tensors do not fit the operations, or the operations cannot be undone.
    """
    try:
        weights = conversion.weights(stored)
        again = conversion.stored(weights)
    except (ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if any(again[name].shape != tensor.shape for name, tensor in stored.items()):
        raise ValueError("the reversed operations return other shapes")
    return weights


def model_weights(
    wanted: Mapping[str, ModelWeight], stored: Mapping[str, Tensor], conversions: Iterable[Conversion]
) -> dict[str, Tensor]:
    """Return the ``wanted`` weights under their names.

    Args:
        wanted: weights of the model, by their name in the result.
        stored: at least ``CheckpointIndex.stored_tensors(wanted)``, by name in the files.
        conversions: of the checkpoint, see ``StoredNames``.
    """
    targets = {weight.made_by for weight in wanted.values() if isinstance(weight, ConvertedWeight)}
    made: dict[str, Tensor] = {}
    for conversion in conversions if targets else ():
        if conversion.target in targets:
            made |= conversion.weights(stored)
    return {
        name: made[weight.name] if isinstance(weight, ConvertedWeight) else stored[weight.name]
        for name, weight in wanted.items()
    }


def require_same_conversions(
    conversions: Iterable[Conversion], tensors: Iterable[IndexedTensor], name: str
) -> None:
    """Raise if transformers converts the tensors of an imported checkpoint in another way than at the import.

    Args:
        conversions: of the installed transformers.
        tensors: of the checkpoint.
        name: name of the checkpoint, for the error.

    Raises:
        ValueError: a conversion is missing, or has other sources; the message names it.
    """
    imported: dict[str, set[str]] = defaultdict(set)
    for tensor in tensors:
        if tensor.part_of is not None:
            imported[tensor.part_of].add(tensor.name)
    known = {each.target: {source.name for source in each.sources} for each in conversions}
    changed = sorted(target for target, sources in imported.items() if known.get(target) != sources)
    if changed:
        raise ValueError(
            f"{name} was imported with another version of transformers, which makes {', '.join(changed[:3])} from other "
            f"stored tensors than transformers {transformers_version} does. Use that version, or remove the artifact "
            "(layerwise gc) and import the model again."
        )


def _only(tensor: Tensor | list[Tensor]) -> Tensor:
    return tensor if isinstance(tensor, torch.Tensor) else tensor[0]
