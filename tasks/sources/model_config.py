"""The configuration of a model, read without running any code that comes with it.

``config.json`` comes from anywhere, and transformers believes what is in it: a billion layers would be built. Its
values are compared with the headers of the tensor files first, and whatever goes wrong in transformers because of them
becomes one line that names the file.
"""

import json
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, TypeGuard, TypeVar

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from layerwise.models.skeleton import UnsupportedModel, build_outline
from layerwise.tasks.sources.checkpoint_files import CONFIG
from layerwise.tasks.sources.folder import Folder
from layerwise.tasks.sources.warn_once import warn_once

T = TypeVar("T")

NUM_LAYERS = "num_hidden_layers"
# Entries that count something the model has at least one of; None where the model type allows it to be left out.
SIZES = (
    NUM_LAYERS,
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
SEARCH_SECONDS = 0.5  # for finding out which value it is that cannot be used
MOST_NESTED = 50  # levels; real ones have four
LABELS = "num_labels"  # of classifiers; transformers makes a table of their names for every model
MOST_LABELS = 10**6
LARGEST_SIZE = 2**31 - 1  # no model comes near; torch computes with numbers of 64 bits
# How transformers 5 writes the floats that JSON has no name for: {"__float__": "Infinity"}.
FLOAT_TAG = "__float__"
FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def read_config_document(folder: Folder) -> dict[str, Any]:
    """``config.json`` of a folder, as plain values.

    Raises:
        ValueError: if it is missing, or not a JSON object.
    """
    if CONFIG not in folder.files:
        raise ValueError(
            f"{folder.name} has no {CONFIG}, so the shape of the model is unknown (it has "
            f"{', '.join(sorted(folder.files)[:6])}). Copy the file there from where the model comes from."
        )
    try:
        document = json.loads(folder.read(CONFIG))
        _check_nesting(document)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{CONFIG} of {folder.name} cannot be read as JSON ({error}). Copy the file again."
        ) from error
    if not isinstance(document, dict):
        raise ValueError(
            f"{CONFIG} of {folder.name} is a {type(document).__name__}, not an object. Copy it again."
        )
    return document


def config_from_document(document: Mapping[str, Any], name: str) -> PretrainedConfig:
    """The configuration object for the content of a ``config.json``.

    Args:
        name: what errors call the model.

    Raises:
        ValueError: if transformers does not know the model type or cannot use a value, or the weights are quantized.
    """
    model_type = str(document.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        own_code = " and brings its own code (auto_map), which is never run" if "auto_map" in document else ""
        raise ValueError(
            f"{name} has the model type {_shown(model_type)}, which this version of transformers does not "
            f"know{own_code}. Use a model that transformers knows, or a version of transformers that knows "
            "this one."
        )
    if quantization := document.get("quantization_config"):
        method = (
            quantization.get("quant_method", "an unnamed method")
            if isinstance(quantization, dict)
            else quantization
        )
        raise ValueError(
            f"{name} is quantized with {method}; weights must be float16, bfloat16 or float32 to be pruned. "
            "Give the original model; a pruned one can be quantized afterwards."
        )
    return built(_config, document, f"{CONFIG} of {name}")


def outline_from_document(document: Mapping[str, Any], name: str) -> PreTrainedModel:
    """The model for the content of a ``config.json``, names and shapes alone.

    Args and errors: as for ``config_from_document``.

    Raises:
        UnsupportedModel: a model that cannot be streamed layer by layer.
    """
    config_from_document(document, name)  # which refuses model types and quantization
    return built(outline, document, f"{CONFIG} of {name}")


def check_values(document: Mapping[str, Any], place: str, layers_stored: int) -> None:
    """Compare what a configuration counts with what the tensor files hold, before anything is built from it.

    Args:
        place: where the values come from, e.g. "config.json of gpt2".
        layers_stored: length of the longest numbered list of modules that the tensors' names tell of.

    Raises:
        ValueError: a size that is not a positive number, or more layers than are stored.
    """
    model_type = str(document.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return  # refused by config_from_document
    own_names: Mapping[str, str] = CONFIG_MAPPING[model_type].attribute_map
    for entries in (document, document.get("text_config")):
        if not isinstance(entries, dict):
            continue
        for size in SIZES:
            for key in dict.fromkeys((size, own_names.get(size, size))):
                if (value := entries.get(key)) is not None:
                    _check_size(size, key, value, place)
        labels = entries.get(LABELS)
        if _is_number(labels) and labels > MOST_LABELS:
            raise ValueError(
                f"{place} has {labels} for {LABELS}, which a language model does not need. Remove the entry."
            )
        num_layers = entries.get(NUM_LAYERS, entries.get(own_names.get(NUM_LAYERS, NUM_LAYERS)))
        if _is_number(num_layers) and num_layers > layers_stored:
            raise ValueError(
                f"{place} asks for {num_layers} layers ({NUM_LAYERS}), but its files hold tensors of "
                f"{layers_stored}. The two are from different models, or files are missing: copy all of "
                "them again."
            )


def notice_own_code(document: Mapping[str, Any], name: str) -> None:
    """Say that code which comes with a model is not run, where transformers has a class of its own for it."""
    if "auto_map" in document:
        warn_once(
            f"{name} brings its own code (auto_map in {CONFIG}), which is never run: transformers' own class for the "
            f"model type {document.get('model_type')!r} is used. Where that code differs from it, results differ, too."
        )


def outline(document: Mapping[str, Any]) -> PreTrainedModel:
    """The model of a configuration whose values are believed; see ``built``."""
    return build_outline(_config(document))


def _config(document: Mapping[str, Any]) -> PretrainedConfig:
    config: PretrainedConfig = CONFIG_MAPPING[document["model_type"]].from_dict(
        decoded_floats(dict(document))
    )
    return config


def built(build: Callable[[Mapping[str, Any]], T], document: Mapping[str, Any], place: str) -> T:
    """What ``build`` makes of a configuration; whatever transformers raises meanwhile becomes one line.

    Every error means here that a value does not fit, and transformers has many kinds of exceptions for that.

    Args:
        place: where the values come from, e.g. "config.json of gpt2".

    Raises:
        ValueError: always in the place of another exception, apart from a lack of memory and ``UnsupportedModel``.
    """
    try:
        return build(document)
    except (UnsupportedModel, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{place} cannot be used{_culprit(build, document)}: {short_reason(error)}. Correct the value, or "
            "copy the file again from where the model comes from."
        ) from error


def _culprit(build: Callable[[Mapping[str, Any]], object], document: Mapping[str, Any]) -> str:
    """The entry without which ``build`` succeeds, as a part of a message: many exceptions do not name it."""
    end = monotonic() + SEARCH_SECONDS
    for key, value in document.items():
        if key == "model_type":
            continue
        if monotonic() > end:
            break
        try:
            build({name: entry for name, entry in document.items() if name != key})
        except Exception:
            continue
        return f" with {_shown(value)} for {key}"
    return ""


def decoded_floats(value: Any) -> Any:
    """``value`` of a JSON document with its infinities, as transformers 5 writes them, as floats."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT_TAG} and str(value[FLOAT_TAG]) in FLOATS:
            return FLOATS[str(value[FLOAT_TAG])]
        return {key: decoded_floats(entry) for key, entry in value.items()}
    return [decoded_floats(entry) for entry in value] if isinstance(value, list) else value


def short_reason(error: BaseException, most: int = 300) -> str:
    """The reason that an exception gives, on one line, with its kind where the text alone says little."""
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= most else f"{text[:most]} ..."
    says_enough = isinstance(error, ValueError) or type(error) is Exception
    return text if says_enough and text else f"{type(error).__name__}: {text}".rstrip(": ")


def _check_nesting(value: object) -> None:
    level = [value]
    for _ in range(MOST_NESTED):
        inner = [
            part.values() if isinstance(part, dict) else part
            for part in level
            if isinstance(part, dict | list)
        ]
        level = [value for part in inner for value in part]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_NESTED} levels deep")


def _check_size(size: str, key: str, value: object, place: str) -> None:
    """Refuse what is not a positive whole number."""
    per_layer = isinstance(value, list) and size not in (NUM_LAYERS, "vocab_size")
    values = value if isinstance(value, list) and per_layer else [value]
    for number in values:
        if number is None or (_is_number(number) and 0 < number <= LARGEST_SIZE):
            continue
        raise ValueError(
            f"{place} has {_shown(value)} for {key}, which must be a whole number from 1 on. Correct it, "
            "or copy the file again from where the model comes from."
        )


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object, most: int = 80) -> str:
    text = f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= most else f"{text[:most]} ..."
