"""Match stored tensors with the weights of a model, and check their shapes against the configuration."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from layerwise.models.skeleton import UnsupportedModel, expected_tensors, layer_prefix
from layerwise.storage.formats.tensor_entry import TensorEntry, dtype_name
from layerwise.tasks.models.checkpoint_index import ConvertedWeight, IndexedTensor
from layerwise.tasks.models.weight_conversion import Conversion, StoredNames, weights_on_meta
from layerwise.tasks.sources.checkpoint_files import StoredTensor
from layerwise.tasks.sources.model_config import warn_once

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = ("F16", "BF16", "F32")
# Wrappers of torch.compile, activation checkpointing, FSDP and DDP, which become parts of tensor names.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
# Buffers that older versions of transformers saved and newer versions compute.
COMPUTED_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)")


def match_tensors(
    stored: Mapping[str, StoredTensor], model: PreTrainedModel, source: str
) -> tuple[tuple[IndexedTensor, ...], tuple[ConvertedWeight, ...]]:
    """Find the model's weights among the stored tensors.

    A name is matched as transformers renames it, and with and without the prefix of the base model: ``layers.0`` in a
    checkpoint saved from the base model is ``model.layers.0``. Any one of several tied weights may be stored. Wrappers
    around the model are removed from the names, with a warning.

    Args:
        model: the model on the meta device.
        source: name of the checkpoint, for errors.

    Returns:
        All tensors, and the weights that transformers makes from some of them.

    Raises:
        ValueError: a tensor is missing, has the wrong shape or dtype, or belongs to a layer that the configuration does
            not have; or two tensors match one weight.
    """
    expected = expected_tensors(model)
    stored, names = _without_wrappers(stored, expected, model, source)
    conversions = [each for each in names.conversions if each.target in expected]
    part_of = {tensor.name: each.target for each in conversions for tensor in each.sources}
    whole = {name: place for name, place in stored.items() if name not in part_of}
    model_names = _model_names(whole, names, expected, model, source)
    _check_tables({name: stored[name] for name in model_names}, model_names, model)
    _check_dtypes({name: stored[name] for name in (*model_names, *part_of)}, source)
    shapes = {name: tuple(stored[name].entry.shape) for name in model_names}
    _check_shapes(shapes, {name: stored[name].file for name in shapes}, model_names, expected, source)
    converted = [
        weight for each in conversions for weight in _converted_weights(each, stored, expected, source)
    ]
    made_from = {weight.name: weight.made_by for weight in converted}
    for name, model_name in model_names.items():
        if model_name in made_from:
            parts = [each for each, target in part_of.items() if target == made_from[model_name]]
            raise _two_tensors_for_one_weight(model_name, name, " with ".join(parts[:3]), source)
    _check_complete(expected, {*model_names.values(), *(weight.name for weight in converted)}, source)
    _check_encoders(stored, names, expected, model, source)
    copies = _tied_copies(model_names, whole, names, model)
    explained = {*model_names, *copies, *_known_unused(whole, names, model)}
    if unexplained := sorted(whole.keys() - explained):
        logger.warning(
            "%s: %d tensors are not used by the model: %s", source, len(unexplained), unexplained[:8]
        )
    in_a_layer = re.compile(rf"{re.escape(layer_prefix(model))}\.(\d+)\.")
    num_layers = model.config.get_text_config().num_hidden_layers
    layers = {
        name: _layer_of(name, names, in_a_layer, num_layers, name in explained, source) for name in stored
    }
    layer_of_conversion = {each.target: layers[each.sources[0].name] for each in conversions}
    ordered = sorted(stored.items(), key=lambda item: (item[1].file, item[1].entry.offset))
    tensors = tuple(
        IndexedTensor(
            name,
            model_names.get(name),
            layers[name],
            place.file,
            place.entry,
            copies.get(name),
            part_of.get(name),
            place.quantized,
        )
        for name, place in ordered
    )
    return tensors, tuple(replace(each, layer=layer_of_conversion[each.made_by]) for each in converted)


def _known_unused(stored: Iterable[str], names: StoredNames, model: PreTrainedModel) -> Iterator[str]:
    """Yield the tensors that are known not to be used: buffers, image and sound encoders, and what transformers ignores."""
    state = model.state_dict()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for name in stored:
        aliases = names.aliases(name)
        if (
            COMPUTED_BUFFERS.fullmatch(name)
            or any(alias in state for alias in aliases)
            or any(pattern.search(alias) for pattern in ignored for alias in aliases)
        ):
            yield name


def _converted_weights(
    conversion: Conversion,
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    source: str,
) -> list[ConvertedWeight]:
    """Return the weights that a conversion makes.

    Raises:
        ValueError: the stored tensors do not fit, or the conversion cannot be undone.
    """
    empty = _sources_on_meta(conversion, stored)
    shown = f"{', '.join(list(empty)[:3])}{' ...' if len(empty) > 3 else ''}"
    try:
        weights = weights_on_meta(conversion, empty)
    except ValueError as error:
        raise ValueError(
            f"{source}: the conversion of {shown} into {conversion.target} fails: {error}. The stored tensors are "
            "incomplete, or from a model of another configuration. Copy all files again."
        ) from error
    if unknown := sorted(weights.keys() - expected.keys()):
        raise ValueError(
            f"{source}: {shown} are converted into {', '.join(unknown)}, which the model does not have. The files are from "
            "a model of another configuration. Copy all files again."
        )
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    _check_shapes(shapes, dict.fromkeys(shapes, shown), {name: name for name in shapes}, expected, source)
    return [
        ConvertedWeight(
            name, conversion.target, None, TensorEntry(dtype_name(weight.dtype), tuple(weight.shape), 0)
        )
        for name, weight in weights.items()
    ]


def _sources_on_meta(conversion: Conversion, stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    entries = {each.name: stored[each.name].entry for each in conversion.sources}
    return {n: torch.empty(e.shape, dtype=e.torch_dtype, device="meta") for n, e in entries.items()}


def _converted_names(conversion: Conversion, stored: Mapping[str, StoredTensor], source: str) -> set[str]:
    """Return the names of the weights that a conversion makes.

    Raises:
        ValueError: the stored tensors do not fit.
    """
    empty = _sources_on_meta(conversion, stored)
    try:
        return set(conversion.weights(empty))
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{source}: the conversion of {', '.join(list(empty)[:3])} into {conversion.target} fails: {error}. The stored "
            "tensors are incomplete, or from a model of another configuration. Copy all files again."
        ) from error


def layers_stored(names: Iterable[str]) -> int:
    """Return the length of the longest numbered list of modules in the names of tensors."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for match in re.finditer(r"\.(\d+)\.", f".{name}"):
            numbers[name[: max(match.start() - 1, 0)]].add(match[1])
    return max(map(len, numbers.values()), default=0)


def _without_wrappers(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, object], model: PreTrainedModel, source: str
) -> tuple[Mapping[str, StoredTensor], StoredNames]:
    """Return the tensors by their names without wrappers, and the meaning of these names.

    Raises:
        ValueError: two tensors then have the same name.
    """
    names = StoredNames(stored, model)
    clean: dict[str, StoredTensor] = {}
    originals: dict[str, str] = {}
    for name, place in stored.items():
        parts = name.split(".")
        shorter = ".".join(part for part in parts if part not in WRAPPERS)
        if any(alias in expected for alias in names.aliases(name)):
            shorter = name  # a module of the model itself has the name of a wrapper
        if shorter in clean:
            raise _two_tensors_for_one_weight(shorter, originals[shorter], name, source)
        clean[shorter], originals[shorter] = place, name
    renamed = [name for short, name in originals.items() if short != name]
    if renamed:
        wrappers = sorted({part for name in renamed for part in name.split(".") if part in WRAPPERS})
        warn_once(
            f"{source}: {len(renamed)} of {len(stored)} tensors were saved from a wrapped model. Their names are used "
            f"and exported without {' and '.join(wrappers)}."
        )
        names = StoredNames(clean, model)
    return clean, names


def _two_tensors_for_one_weight(model_name: str, one: str, other: str, source: str) -> ValueError:
    return ValueError(
        f"{source} holds two tensors for {model_name}: {one} and {other}. Remove one of them, or save the model again "
        "with save_pretrained."
    )


def _model_names(
    stored: Iterable[str],
    names: StoredNames,
    expected: Mapping[str, object],
    model: PreTrainedModel,
    source: str,
) -> dict[str, str]:
    """Map stored names to state-dict names."""
    found: dict[str, str] = {}  # state-dict name -> stored name
    for name in stored:
        model_name = next((alias for alias in names.aliases(name) if alias in expected), None)
        if model_name is None:
            continue
        if model_name in found:
            raise _two_tensors_for_one_weight(model_name, found[model_name], name, source)
        found[model_name] = name
    for name in stored:  # tied weights, if only the other one was saved
        for alias in names.aliases(name):
            tied_to = model.all_tied_weights_keys.get(alias)
            if tied_to is not None and tied_to in expected:
                found.setdefault(tied_to, name)
    return {name: model_name for model_name, name in found.items()}


def _tied_copies(
    model_names: Mapping[str, str], stored: Iterable[str], names: StoredNames, model: PreTrainedModel
) -> dict[str, str]:
    """Map stored tensors to the stored tensors that the model ties them to."""
    stored_as = {model_name: name for name, model_name in model_names.items()}
    return {
        name: stored_as[tied_to]
        for name in stored
        for alias in names.aliases(name)
        if name not in model_names and (tied_to := model.all_tied_weights_keys.get(alias)) in stored_as
    }


def _check_complete(expected: Iterable[str], found: Iterable[str], source: str) -> None:
    expected = list(expected)
    missing = sorted(set(expected) - set(found))
    if not missing:
        return
    hint = "Download the checkpoint again; if it is an adapter (LoRA), merge it into its base model first."
    if all("lm_head" in name or "embed_out" in name for name in missing):
        hint = 'If head and embedding are shared, set "tie_word_embeddings": true in config.json.'
    raise ValueError(
        f"{source} lacks {len(missing)} of the {len(expected)} tensors its config.json asks for: "
        f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. {hint}"
    )


def _check_encoders(
    stored: Mapping[str, StoredTensor],
    names: StoredNames,
    expected: Mapping[str, object],
    model: PreTrainedModel,
    source: str,
) -> None:
    """Check the tensors that are copied byte for byte, e.g. those of an image encoder, against the model.

    Raises:
        ValueError: one is missing or has the wrong shape.
    """
    parameters = {name for name, _ in model.named_parameters()}
    copied = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in expected and name not in model.all_tied_weights_keys
    }
    if not copied:
        return
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, str] = {}
    part_of_conversion, converted = set[str](), set[str]()
    for conversion in names.conversions:
        if conversion.target not in expected:
            part_of_conversion |= {each.name for each in conversion.sources}
            # Only the names: the files are copied, and sizes of a conversion may be those of the encoder's own configuration.
            converted |= _converted_names(conversion, stored, source)
    for name, place in stored.items():
        known_as = next((alias for alias in names.aliases(name) if alias in copied), None)
        if known_as is not None and name not in part_of_conversion:
            shapes[known_as], places[known_as] = tuple(place.entry.shape), place.file
    _check_shapes(shapes, places, {name: name for name in shapes}, copied, source)
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = sorted(
        name
        for name in copied.keys() & parameters - shapes.keys() - converted
        if not any(pattern.search(name) for pattern in optional)
    )
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} of the {len(copied)} tensors of its image or sound encoder: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Download the checkpoint again."
        )


def _check_tables(
    weights: Mapping[str, StoredTensor], model_names: Mapping[str, str], model: PreTrainedModel
) -> None:
    """Refuse a model with tables of whole numbers, which the dtype of the computation cannot hold.

    Raises:
        UnsupportedModel: the message names the first one.
    """
    state = model.state_dict()
    for name, place in weights.items():
        if place.entry.dtype not in WEIGHT_DTYPES and not state[model_names[name]].is_floating_point():
            raise UnsupportedModel(
                f"{model.config.model_type} has a table of whole numbers among its weights ({name}, {place.entry.dtype}), "
                "which the dtype of the computation cannot hold. Use another model."
            )


def _check_dtypes(weights: Mapping[str, StoredTensor], source: str) -> None:
    for name, place in weights.items():
        if place.entry.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{name} in {place.file} of {source} is stored as {place.entry.dtype}; weights must be one "
                f"of {', '.join(WEIGHT_DTYPES)} to be pruned. {_dtype_advice(place.entry.dtype)}"
            )


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    places: Mapping[str, str],
    model_names: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    for name, shape in shapes.items():
        if shape != expected[model_names[name]]:
            raise ValueError(
                f"{name} in {places[name]} of {source} has the shape {shape}, but "
                f"config.json asks for {expected[model_names[name]]}. Weights and config.json are from different "
                "models: copy both again."
            )


def _dtype_advice(dtype: str) -> str:
    if dtype == "F64":
        return (
            'Convert them: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('SOURCE', dtype='float32').save_pretrained('NEW')\", then use NEW (with the tokenizer "
            "files copied into it)."
        )
    if dtype.startswith("C"):
        return "Models with complex weights cannot be pruned: use another model."
    if dtype == "BOOL":
        return "A mask is not a weight: save the model again with save_pretrained."
    return "Use the original model, not a quantized one; the pruned model can be quantized afterwards."


def _layer_of(
    name: str,
    names: StoredNames,
    in_a_layer: re.Pattern[str],
    num_layers: int,
    is_explained: bool,
    source: str,
) -> int | None:
    matches = [match for alias in names.aliases(name) if (match := in_a_layer.match(alias))]
    if not matches:
        return None
    layer = int(matches[0][1])
    if (
        layer >= num_layers and is_explained
    ):  # e.g. layers for multi-token prediction, which transformers ignores
        return None
    if layer >= num_layers:
        raise ValueError(
            f"{source} holds {name}, but config.json says the model has {num_layers} layers (the last is "
            f"number {num_layers - 1}). Weights and config.json are from different models: copy both again."
        )
    return layer
