"""Match stored tensors with the weights of a model, and check their shapes against the configuration."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from layerwise.models.skeleton import expected_tensors, layer_prefix
from layerwise.tasks.models.checkpoint_index import IndexedTensor
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
) -> tuple[IndexedTensor, ...]:
    """Find the model's weights among the stored tensors.

    A name is matched with and without the prefix of the base model: ``layers.0`` in a checkpoint saved from the base
    model is ``model.layers.0``. Any one of several tied weights may be stored. Wrappers around the model are removed
    from the names, with a warning.

    Args:
        model: the model on the meta device.
        source: name of the checkpoint, for errors.

    Raises:
        ValueError: a tensor is missing, has the wrong shape or dtype, or belongs to a layer that the configuration does
            not have; or two tensors match one weight.
    """
    expected = expected_tensors(model)
    stored = _without_wrappers(stored, expected, model, source)
    model_names = _model_names(stored, expected, model, source)
    _check_complete(expected, model_names, source)
    _check_fit(stored, expected, model_names, source)
    copies = _tied_copies(model_names, stored, model)
    unused = sorted(name for name in stored if name not in model_names and name not in copies)
    if unexplained := [name for name in unused if not COMPUTED_BUFFERS.fullmatch(name)]:
        logger.warning(
            "%s: %d tensors are not used by the model: %s", source, len(unexplained), unexplained[:8]
        )
    layers = {name: _layer_of(name, model, source) for name in stored}
    ordered = sorted(stored.items(), key=lambda item: (item[1].file, item[1].entry.offset))
    return tuple(
        IndexedTensor(name, model_names.get(name), layers[name], place.file, place.entry, copies.get(name))
        for name, place in ordered
    )


def aliases(name: str, model: PreTrainedModel) -> tuple[str, ...]:
    """Return the possible names in the model of a stored tensor.

    These are the name itself, the name with and without the base model's prefix, and the name that transformers gives
    it on loading (``lm_head`` for GPT-NeoX's ``embed_out``).
    """
    prefix = f"{model.base_model_prefix}."
    renamed, _ = rename_source_key(name, _renamings(model), [])
    return name, prefix + name, name.removeprefix(prefix), renamed


@lru_cache(maxsize=1)
def _renamings(model: PreTrainedModel) -> list[WeightRenaming]:
    found = get_model_conversion_mapping(model, add_legacy=False)
    return [each for each in found if isinstance(each, WeightRenaming)]


def layers_stored(names: Iterable[str]) -> int:
    """Return the length of the longest numbered list of modules in the names of tensors."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for match in re.finditer(r"\.(\d+)\.", f".{name}"):
            numbers[name[: max(match.start() - 1, 0)]].add(match[1])
    return max(map(len, numbers.values()), default=0)


def _without_wrappers(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, object], model: PreTrainedModel, source: str
) -> Mapping[str, StoredTensor]:
    """Return the tensors by their names without wrappers.

    Raises:
        ValueError: two tensors then have the same name.
    """
    clean: dict[str, StoredTensor] = {}
    originals: dict[str, str] = {}
    for name, place in stored.items():
        parts = name.split(".")
        shorter = ".".join(part for part in parts if part not in WRAPPERS)
        if any(alias in expected for alias in aliases(name, model)):
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
    return clean


def _two_tensors_for_one_weight(model_name: str, one: str, other: str, source: str) -> ValueError:
    return ValueError(
        f"{source} holds two tensors for {model_name}: {one} and {other}. Remove one of them, or save the model again "
        "with save_pretrained."
    )


def _model_names(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, object], model: PreTrainedModel, source: str
) -> dict[str, str]:
    """Map stored names to state-dict names."""
    found: dict[str, str] = {}  # state-dict name -> stored name
    for name in stored:
        model_name = next((alias for alias in aliases(name, model) if alias in expected), None)
        if model_name is None:
            continue
        if model_name in found:
            raise _two_tensors_for_one_weight(model_name, found[model_name], name, source)
        found[model_name] = name
    for name in stored:  # tied weights, if only the other one was saved
        for alias in aliases(name, model):
            tied_to = model.all_tied_weights_keys.get(alias)
            if tied_to is not None and tied_to in expected:
                found.setdefault(tied_to, name)
    return {name: model_name for model_name, name in found.items()}


def _tied_copies(
    model_names: Mapping[str, str], stored: Mapping[str, StoredTensor], model: PreTrainedModel
) -> dict[str, str]:
    """Map stored tensors to the stored tensors that the model ties them to."""
    stored_as = {model_name: name for name, model_name in model_names.items()}
    return {
        name: stored_as[tied_to]
        for name in stored
        for alias in aliases(name, model)
        if name not in model_names and (tied_to := model.all_tied_weights_keys.get(alias)) in stored_as
    }


def _check_complete(expected: Mapping[str, object], model_names: Mapping[str, str], source: str) -> None:
    missing = sorted(set(expected) - set(model_names.values()))
    if not missing:
        return
    hint = "Download the checkpoint again; if it is an adapter (LoRA), merge it into its base model first."
    if all("lm_head" in name or "embed_out" in name for name in missing):
        hint = 'If head and embedding are shared, set "tie_word_embeddings": true in config.json.'
    raise ValueError(
        f"{source} lacks {len(missing)} of the {len(expected)} tensors its config.json asks for: "
        f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. {hint}"
    )


def _check_fit(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    model_names: Mapping[str, str],
    source: str,
) -> None:
    for name, model_name in model_names.items():
        entry = stored[name].entry
        if entry.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{name} in {stored[name].file} of {source} is stored as {entry.dtype}; weights must be one "
                f"of {', '.join(WEIGHT_DTYPES)} to be pruned. {_dtype_advice(entry.dtype)}"
            )
        if tuple(entry.shape) != expected[model_name]:
            raise ValueError(
                f"{name} in {stored[name].file} of {source} has the shape {tuple(entry.shape)}, but "
                f"config.json asks for {expected[model_name]}. Weights and config.json are from different "
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


def _layer_of(name: str, model: PreTrainedModel, source: str) -> int | None:
    pattern = re.compile(rf"{re.escape(layer_prefix(model))}\.(\d+)\.")
    matches = [match for alias in aliases(name, model) if (match := pattern.match(alias))]
    if not matches:
        return None
    layer, num_layers = int(matches[0][1]), model.config.get_text_config().num_hidden_layers
    if layer >= num_layers:
        raise ValueError(
            f"{source} holds {name}, but config.json says the model has {num_layers} layers (the last is "
            f"number {num_layers - 1}). Weights and config.json are from different models: copy both again."
        )
    return layer
