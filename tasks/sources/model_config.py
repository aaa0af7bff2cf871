"""The configuration of a model, read without running code that comes with the model.

``config.json`` may come from anywhere, and transformers does not check it: it would build a billion layers. Therefore
the values are first compared with the headers of the tensor files. Any exception that they cause in transformers is
replaced by one line that names the file.
"""

import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from time import monotonic
from typing import Any, TypeGuard, TypeVar

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from layerwise.models.skeleton import UnsupportedModel, build_outline
from layerwise.tasks.sources.checkpoint_files import CONFIG
from layerwise.tasks.sources.folder import Folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_LAYERS = "num_hidden_layers"
# Entries that must be positive if they are given.
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
ROTATED = "qk_rope_head_dim"
SEARCH_SECONDS = 0.5  # time limit of the search for the invalid value
MOST_NESTED = 50  # levels; real configurations have four
MOST_ENCODER_LAYERS = 1000  # of images or sound; not all of them have numbered layers in the files
LABELS = "num_labels"  # classes of a classifier; transformers builds a table of their names for every model
MOST_LABELS = 10**6
# Far above every model, and products of two sizes still fit into the 64 bits of torch.
LARGEST_SIZE = 2**31 - 1
# transformers 5 writes the floats that JSON does not have as {"__float__": "Infinity"}.
FLOAT_TAG = "__float__"
FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def read_config_document(folder: Folder) -> dict[str, Any]:
    """Read ``config.json`` of a folder as plain values.

    Raises:
        ValueError: the file is missing, or it is not a JSON object.
    """
    if CONFIG not in folder.files:
        raise ValueError(
            f"{folder.name} has no {CONFIG}, so the shape of the model is unknown (it has "
            f"{', '.join(sorted(folder.files)[:6])}). Copy the file from the original model."
        )
    try:
        document = json.loads(folder.read(CONFIG))
        _check_nesting(document)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{CONFIG} of {folder.name} is not valid JSON ({error}). Copy the file again."
        ) from error
    if not isinstance(document, dict):
        raise ValueError(
            f"{CONFIG} of {folder.name} is a {type(document).__name__}, not an object. Copy the file again."
        )
    return document


def config_from_document(document: Mapping[str, Any], name: str) -> PretrainedConfig:
    """Build the configuration object from the content of a ``config.json``.

    Args:
        name: name of the model for messages.

    Raises:
        ValueError: transformers does not know the model type or cannot use a value, or the weights are quantized.
    """
    model_type = str(document.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        own_code = (
            ". It comes with its own code (auto_map), which is never run" if "auto_map" in document else ""
        )
        raise ValueError(
            f"{name} has the model type {_shown(model_type)}, which this version of transformers does not "
            f"know{own_code}. Use another model, or a version of transformers that knows this one."
        )
    if quantization := document.get("quantization_config"):
        method = (
            quantization.get("quant_method", "an unnamed method")
            if isinstance(quantization, dict)
            else quantization
        )
        raise ValueError(
            f"{name} is quantized with {method}, but only weights in float16, bfloat16, float32, fp8 with block "
            "scales and mxfp4 can be read. Give the original model. The pruned model can be quantized afterwards."
        )
    return built(_config, document, f"{CONFIG} of {name}")


def outline_from_document(document: Mapping[str, Any], name: str) -> PreTrainedModel:
    """Build the model from the content of a ``config.json``: names and shapes only, without weights.

    Args:
        name: name of the model for messages.

    Raises:
        ValueError: see ``config_from_document``.
        UnsupportedModel: the model cannot be streamed layer by layer.
    """
    config_from_document(document, name)  # refuses unknown model types and quantized weights
    return built(outline, document, f"{CONFIG} of {name}")


def check_values(document: Mapping[str, Any], place: str, layers_stored: int) -> None:
    """Check the sizes in a configuration against the tensor files, before anything is built from it.

    Args:
        place: origin of the values, e.g. "config.json of gpt2".
        layers_stored: length of the longest numbered list of modules in the names of the tensors.

    Raises:
        ValueError: a size is not a positive whole number, or there are more layers than stored ones.
    """
    model_type = str(document.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return  # config_from_document refuses it
    own_names: Mapping[str, str] = CONFIG_MAPPING[model_type].attribute_map
    parts = [
        value for name, value in document.items() if name.endswith("_config") and isinstance(value, dict)
    ]
    for entries in (document, *parts):
        for size in SIZES:
            for key in dict.fromkeys((size, own_names.get(size, size))):
                # Attention whose positions are not rotated has 0 for both.
                without_rotation = key == "head_dim" and entries.get(key) == entries.get(ROTATED) == 0
                if (value := entries.get(key)) is not None and not without_rotation:
                    _check_size(size, key, value, place)
        labels = entries.get(LABELS)
        if _is_number(labels) and labels > MOST_LABELS:
            raise ValueError(
                f"{place} has {labels} for {LABELS}, more than {MOST_LABELS}. A language model does not need this "
                "entry. Remove it."
            )
        num_layers = entries.get(NUM_LAYERS, entries.get(own_names.get(NUM_LAYERS, NUM_LAYERS)))
        is_text = entries is document or entries is document.get("text_config")
        if _is_number(num_layers) and num_layers > (layers_stored if is_text else MOST_ENCODER_LAYERS):
            raise ValueError(
                f"{place} asks for {num_layers} layers ({NUM_LAYERS}), but the files hold tensors of "
                f"{layers_stored}. The two are from different models, or files are missing. Copy all of "
                "them again."
            )


def notice_own_code(document: Mapping[str, Any], name: str) -> None:
    """Warn that code which comes with a model is not run, and that transformers' own class is used instead."""
    if "auto_map" in document:
        warn_once(
            f"{name} comes with its own code (auto_map in {CONFIG}), which is never run. transformers' own class for "
            f"the model type {document.get('model_type')!r} is used. If the two differ, the results differ too."
        )


def outline(document: Mapping[str, Any]) -> PreTrainedModel:
    """Build the model of a configuration whose values have been checked; see ``built``."""
    return build_outline(_config(document))


def _config(document: Mapping[str, Any]) -> PretrainedConfig:
    config: PretrainedConfig = CONFIG_MAPPING[document["model_type"]].from_dict(
        decoded_floats(dict(document))
    )
    return config


def built(build: Callable[[Mapping[str, Any]], T], document: Mapping[str, Any], place: str) -> T:
    """Call ``build`` with a configuration, and replace every exception by one line.

    Here every exception means that a value is not valid, and transformers raises many kinds of them for that.

    Args:
        place: origin of the values, e.g. "config.json of gpt2".

    Raises:
        ValueError: in place of every exception except ``MemoryError`` and ``UnsupportedModel``.
    """
    try:
        return build(document)
    except (UnsupportedModel, MemoryError):
        raise
    except ImportError as error:  # some image encoders come from other packages
        raise ValueError(
            f"the model of {place} needs a package that is not installed: {short_reason(error)}. Install it."
        ) from error
    except Exception as error:
        raise ValueError(
            f"{place} cannot be used{_culprit(build, document)}: {short_reason(error)}. Correct the value, or "
            "copy the file again from the original model."
        ) from error


def _culprit(build: Callable[[Mapping[str, Any]], object], document: Mapping[str, Any]) -> str:
    """Name the entry without which ``build`` succeeds, as a part of a message; many exceptions do not name it."""
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
    """Replace the infinities and NaNs that transformers 5 writes into JSON (``FLOAT_TAG``) by floats."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT_TAG} and str(value[FLOAT_TAG]) in FLOATS:
            return FLOATS[str(value[FLOAT_TAG])]
        return {key: decoded_floats(entry) for key, entry in value.items()}
    return [decoded_floats(entry) for entry in value] if isinstance(value, list) else value


def short_reason(error: BaseException, most: int = 300) -> str:
    """Return the message of an exception on one line; with the exception's class if the message alone says little."""
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
    """Refuse a value that is not a positive whole number, or a list of them if sizes may differ by layer."""
    per_layer = isinstance(value, list) and size not in (NUM_LAYERS, "vocab_size")
    values = value if isinstance(value, list) and per_layer else [value]
    for number in values:
        if number is None or (_is_number(number) and 0 < number <= LARGEST_SIZE):
            continue
        raise ValueError(
            f"{place} has {_shown(value)} for {key}, which must be a whole number from 1 to {LARGEST_SIZE}. Correct "
            "it, or copy the file again from the original model."
        )


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object, most: int = 80) -> str:
    text = f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= most else f"{text[:most]} ..."


@cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has already logged the same one."""
    logger.warning("%s", message)
