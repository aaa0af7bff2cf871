"""Names and layouts of stored tensors, by the mapping with which transformers loads and saves them.

Most tensors are only renamed. Others are stored in another layout than the model's: several tensors make one weight, or
one makes several, by operations of transformers (merge, concatenate, split, transpose). The same operations, reversed,
give an export the names and the layout of its source.

The experts of a layer are one tensor in transformers and linears of their own in a streamed model. Most checkpoints also
store them one by one. Then the stored tensors are used as they are, and nothing is merged.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
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

from layerwise.models.experts import FusedTensor, fused_tensors
from layerwise.tasks.models.checkpoint_index import ConvertedWeight, IndexedTensor, ModelWeight

SMALL = (2, 3)  # shape of the tensors that show what a conversion does


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
        experts: stored tensors that are parameters of experts as they are, by state-dict name of the parameter (``FusedTensor``);
            empty if the operations do more than merge the experts, or make something else.
    """

    target: str
    sources: tuple[ConvertedTensor, ...]
    converter: WeightConverter
    model: PreTrainedModel
    experts: Mapping[str, str]

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
        state, prefix, fused = model.state_dict(), model.base_model_prefix, fused_tensors(model)
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
        conversions = (
            Conversion(target, tuple(sources), by_pattern[sources[0].pattern], model, {})
            for target, sources in inputs.items()
        )
        self.conversions = tuple(
            replace(each, experts=_stored_experts(each, fused)) if each.target in fused else each
            for each in conversions
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


def _stored_experts(conversion: Conversion, fused: Mapping[str, FusedTensor]) -> dict[str, str]:
    """Return the parameters of experts that are stored as they are, see ``Conversion.experts``.

    The conversion is applied to small tensors with different values, which are found again among its results.
    """
    size = math.prod(SMALL)
    small = {
        source.name: torch.arange(number * size, (number + 1) * size).view(SMALL)
        for number, source in enumerate(conversion.sources)
    }
    try:
        made = conversion.weights(small)
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError):
        return {}  # it depends on the shapes: the tensors are merged as by transformers
    found: dict[str, str] = {}
    for name, tensor in made.items():
        if name not in fused or tensor.ndim != 1 + len(SMALL):
            return {}
        parts = [
            (part, number * SMALL[0], (number + 1) * SMALL[0])
            for number, (part, *_) in enumerate(fused[name].parts)
        ]
        shape = (fused[name].shape[0], SMALL[0] * len(parts), SMALL[1])
        if tensor.shape != shape:
            return {}
        small_fused = replace(fused[name], shape=shape, axis=0, parts=tuple(parts))
        for parameter, values in small_fused.split(name, tensor).items():
            source = conversion.sources[int(values[0, 0]) // size].name
            if not torch.equal(values, small[source]):
                return {}
            found[parameter] = source
    return found if len(set(found.values())) == len(small) else {}


def model_weights(
    wanted: Mapping[str, ModelWeight],
    stored: Mapping[str, Tensor],
    conversions: Iterable[Conversion],
    experts: Mapping[str, FusedTensor],
) -> dict[str, Tensor]:
    """Return the ``wanted`` weights under their names; the weights of experts one by one.

    Args:
        wanted: weights of the model, by their name in the result.
        stored: at least ``CheckpointIndex.stored_tensors(wanted)``, by name in the files.
        conversions: of the checkpoint, see ``StoredNames``.
        experts: tensors with the weights of all experts of a layer, by state-dict name.
    """
    targets = {weight.made_by for weight in wanted.values() if isinstance(weight, ConvertedWeight)}
    used = {each.target: each for each in conversions if each.target in targets} if targets else {}
    made: dict[str, Tensor] = {}
    for conversion in used.values():
        if not conversion.experts:
            made |= conversion.weights(stored)
    result: dict[str, Tensor] = {}
    for name, weight in wanted.items():
        fused = experts.get(weight.model_name or "")
        if (
            isinstance(weight, ConvertedWeight)
            and fused is not None
            and (known := used[weight.made_by].experts)
        ):
            parameters = zip(fused.names(name), fused.names(weight.name), strict=True)
            result |= {parameter: stored[known[full]] for parameter, full in parameters}
            continue
        tensor = made[weight.name] if isinstance(weight, ConvertedWeight) else stored[weight.name]
        result |= {name: tensor} if fused is None else fused.split(name, tensor)
    return result


def parameter_names(
    tensors: Iterable[IndexedTensor],
    conversions: Iterable[Conversion],
    experts: Mapping[str, FusedTensor],
) -> dict[str, str]:
    """Return the names of parameters in a streamed model by the names of the stored tensors, which hold their values.

    Args:
        tensors: all of a checkpoint; those that the model does not use have no entry in the result.
        conversions: of the checkpoint, see ``StoredNames``.
        experts: tensors with the weights of all experts of a layer, by state-dict name.

    Raises:
        ValueError: a stored tensor holds several parameters, or a part of one.
    """
    tensors = list(tensors)
    names = {tensor.name: tensor.model_name for tensor in tensors if tensor.model_name is not None}
    targets = {tensor.part_of for tensor in tensors}
    for stored, name in names.items():
        if name in experts:
            raise ValueError(f"{stored} holds a weight of all experts of a layer")
    for conversion in conversions:
        if conversion.target in targets:
            if not conversion.experts:
                raise ValueError(f"{conversion.sources[0].name} has another layout than {conversion.target}")
            names |= {stored: parameter for parameter, stored in conversion.experts.items()}
    return names


def stored_tensors_of(
    weights: Mapping[str, Tensor],
    places: Mapping[str, ModelWeight],
    conversions: Iterable[Conversion],
    experts: Mapping[str, FusedTensor],
) -> dict[str, Tensor]:
    """Return the stored tensors that give ``weights``, by name in the files: the inverse of ``model_weights``.

    Args:
        weights: all weights of ``places``, those of experts one by one.
        places: weights of the checkpoint, by the names that ``model_weights`` gives them.
    """
    by_target = {each.target: each for each in conversions}
    stored: dict[str, Tensor] = {}
    made: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, place in places.items():
        fused = experts.get(place.model_name or "")
        if (
            isinstance(place, ConvertedWeight)
            and fused is not None
            and (known := by_target[place.made_by].experts)
        ):
            parameters = zip(fused.names(name), fused.names(place.name), strict=True)
            stored |= {known[full]: weights[parameter] for parameter, full in parameters}
            continue
        weight = weights[name] if fused is None else fused.joined(name, weights)
        if isinstance(place, ConvertedWeight):
            made[place.made_by][place.name] = weight
        else:
            stored[place.name] = weight
    for target, of_target in made.items():
        stored |= by_target[target].stored(of_target)
    return stored


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
