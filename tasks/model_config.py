"""The configuration of a model, read without running any code that comes with it."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from tasks.checkpoint_files import CONFIG
from tasks.folder import Folder


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
    except ValueError as error:
        raise ValueError(f"{CONFIG} of {folder.name} is not JSON ({error}). Copy the file again.") from error
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
        ValueError: if transformers does not know the model type, or the weights are quantized.
    """
    model_type = str(document.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        own_code = " and brings its own code (auto_map), which is never run" if "auto_map" in document else ""
        raise ValueError(
            f"{name} has the model type {model_type!r}, which this version of transformers does not "
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
    config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(dict(document))
    return config
