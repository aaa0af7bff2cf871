"""Index of a checkpoint in a folder."""

import json
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from layerwise.models.skeleton import layer_prefix, weights_of_several_layers
from layerwise.models.streaming_check import layout_of
from layerwise.storage.draft import Draft
from layerwise.storage.files.reading import read_ahead
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.storage.layer_cache import LayerCache
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import needed_bytes, read_entries
from layerwise.tasks.models.checkpoint_index import CheckpointIndex, IndexedTensor
from layerwise.tasks.models.finite_weights import require_finite
from layerwise.tasks.models.tensor_matching import layers_stored, match_tensors
from layerwise.tasks.running.progress import showing
from layerwise.tasks.running.stopping import stop, stop_deferred
from layerwise.tasks.sources.checkpoint_files import CONFIG, StoredTensor, stored_tensors
from layerwise.tasks.sources.folder import Folder
from layerwise.tasks.sources.model_config import (
    check_values,
    config_from_document,
    notice_own_code,
    outline_from_document,
    read_config_document,
    warn_once,
)
from layerwise.tasks.sources.quantized_weights import (
    QUANTIZATION,
    dequantized,
    dequantized_tensors,
    quantization_of,
)

DIGESTS = "digests.json"
ADAPTER_CONFIG = "adapter_config.json"
TIED = "tie_word_embeddings"


def describe_folder(folder: Folder) -> CheckpointIndex:
    """Read the index of ``folder`` without digests, from ``config.json`` and the headers of the tensor files.

    The index of a quantized model describes the dequantized weights: it is not ``in_place``.

    The headers are read first, so that no model is built from a configuration that asks for more than they hold.

    Raises:
        ValueError: the files are not a model that can be pruned.
        Corrupt: a file contradicts its own header.
    """
    refuse_adapter(folder)
    document = read_config_document(folder)
    stored = stored_tensors(folder)
    check_values(document, f"{CONFIG} of {folder.name}", layers_stored(stored))
    quantization = quantization_of(document)
    if quantization is not None:
        stored = dequantized_tensors(stored, quantization, folder.name)
        del document[QUANTIZATION]
    notice_own_code(document, folder.name)
    index = _matched(document, stored, folder.name, in_place=quantization is None)
    if not _says_whether_tied(document) and (copy := _copy_that_differs(folder, index)) is not None:
        warn_once(
            f"{folder.name}: config.json does not say whether head and embedding are shared ({TIED}), and {copy} is stored with "
            "values of its own. As in transformers, it is not shared."
        )
        untied = {**document, TIED: False}
        index = _matched(untied, stored, folder.name, in_place=quantization is None)
    require_streamable(index, folder.name)
    return index


def _matched(
    document: dict[str, Any], stored: Mapping[str, StoredTensor], name: str, in_place: bool
) -> CheckpointIndex:
    model = outline_from_document(document, name)
    tensors, converted = match_tensors(stored, model, name)
    num_layers = model.config.get_text_config().num_hidden_layers
    shared = weights_of_several_layers(model)
    return CheckpointIndex(document, layer_prefix(model), num_layers, in_place, tensors, converted, shared)


def _says_whether_tied(document: Mapping[str, Any]) -> bool:
    return any(
        TIED in part for part in (document, document.get("text_config") or {}) if isinstance(part, dict)
    )


def _copy_that_differs(folder: Folder, index: CheckpointIndex) -> str | None:
    """Return the name of a stored tensor that is tied to another one but has other values; None if there is none.

    Reads up to the first difference.
    """
    named = {tensor.name: tensor for tensor in index.tensors}
    for copy in index.tensors:
        if copy.copy_of is None or copy.quantized is not None or named[copy.copy_of].quantized is not None:
            continue
        pair = [copy, named[copy.copy_of]]
        if len({(tensor.entry.dtype, tensor.entry.shape) for tensor in pair}) > 1:
            return copy.name
        ranges = [[(folder.path(each.file), each.entry.offset, each.entry.nbytes)] for each in pair]
        with (
            closing(read_ahead(folder.fs, ranges[0])) as ones,
            closing(read_ahead(folder.fs, ranges[1])) as others,
        ):
            if any(one != other for one, other in zip(ones, others, strict=True)):
                return copy.name
    return None


def require_streamable(index: CheckpointIndex, name: str) -> None:
    """Raise if the model cannot be streamed layer by layer.

    Raises:
        UnsupportedModel: see ``layout_of``.
    """
    layout_of(config_from_document(index.config, name), index.outer_shapes)


def is_quantized(folder: Folder) -> bool:
    """Return whether ``folder`` has quantized weights that an import dequantizes."""
    return quantization_of(read_config_document(folder)) is not None


def read_tensors_of(
    folder: Folder, tensors: Sequence[IndexedTensor], buffer: Tensor | None = None
) -> dict[str, Tensor]:
    """Read tensors of ``folder`` by their names, and dequantize the quantized ones.

    Args:
        buffer: uint8 memory of ``read_size(tensors)`` bytes to read into; None to allocate it.

    Raises:
        Corrupt: a file is shorter than its header says, or cannot be read.
        SourceChanged: a file has changed since the folder was listed.
    """
    if buffer is None:
        buffer = torch.empty(read_size(tensors), dtype=torch.uint8)
    found: dict[str, Tensor] = {}
    start = 0
    for file, entries in _stored_parts(tensors).items():
        end = start + needed_bytes(entries)
        found |= read_entries(folder.fs, folder.path(file), entries, buffer[start:end])
        folder.require_unchanged(file)
        start = end
    weights = {}
    for tensor in tensors:
        if (parts := tensor.quantized) is None:
            weights[tensor.name] = found[tensor.name]
        else:
            weights[tensor.name] = dequantized(parts, found[parts.values_name], found[parts.scales_name])
    return weights


def read_size(tensors: Sequence[IndexedTensor]) -> int:
    """Return the size of the buffer, in bytes, that ``read_tensors_of`` needs."""
    return sum(needed_bytes(entries) for entries in _stored_parts(tensors).values())


def _stored_parts(tensors: Sequence[IndexedTensor]) -> dict[str, dict[str, TensorEntry]]:
    """Return the stored tensors that ``tensors`` consist of, by file and name."""
    files: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for tensor in tensors:
        if (parts := tensor.quantized) is None:
            files[tensor.file][tensor.name] = tensor.entry
        else:
            files[parts.values.file][parts.values_name] = parts.values.entry
            files[parts.scales.file][parts.scales_name] = parts.scales.entry
    return files


def refuse_adapter(folder: Folder) -> None:
    """Refuse a folder with files of an adapter, such as LoRA: its weights would be ignored silently.

    Raises:
        ValueError: the folder holds an adapter; the message names the files and says how to merge them.
    """
    files = sorted(
        name for name in folder.files if name == ADAPTER_CONFIG or name.startswith("adapter_model")
    )
    if not files:
        return
    kind, base = "an adapter", "BASE"
    if ADAPTER_CONFIG in files:
        try:
            settings = json.loads(folder.read(ADAPTER_CONFIG))
        except (ValueError, RecursionError):
            settings = None  # the message then has placeholders
        if isinstance(settings, dict):
            kind = f"an adapter ({settings.get('peft_type', 'of an unnamed kind')})"
            base = str(settings.get("base_model_name_or_path") or base)
    merge = (
        f'python -c "from peft import PeftModel; from transformers import AutoModelForCausalLM as M; '
        f"PeftModel.from_pretrained(M.from_pretrained({base!r}, dtype='auto'), 'ADAPTER')"
        ".merge_and_unload().save_pretrained('NEW')\""
    )
    whole = any(name.endswith(".safetensors") and name not in files for name in folder.files)
    remedy = (
        f"If it is already merged into the weights, remove these files; if not, merge it: {merge}, and use NEW"
        if whole
        else f"Merge it into the model that it was trained on: {merge}, and use NEW"
    )
    raise ValueError(
        f"{folder.name} holds {kind} {'next to the weights' if whole else 'and no model'}: {', '.join(files)}. "
        f"Adapters are not applied. {remedy} (with the tokenizer files copied into it)."
    )


def index_in_place(store: ArtifactStore, draft: Draft, folder: Folder) -> CheckpointIndex:
    """Return the index of ``folder`` with the digest of every tensor; every byte is read once, in pieces.

    Later tensors of a file are read while the digests of earlier ones are computed. Leaves a resume point after every
    file.

    Raises:
        ValueError: the files are not a model that can be pruned, or a weight holds NaN or infinity.
        Corrupt: a file contradicts its own header or cannot be read.
        SourceChanged: a file changes while it is read.
    """
    index = describe_folder(folder)
    check_tied_copies(folder, index)
    digests: dict[str, str] = json.loads(store.read(draft.resumed.state, DIGESTS)) if draft.resumed else {}
    files = list(dict.fromkeys(tensor.file for tensor in index.tensors))
    total, read = len(index.tensors), 0
    title = "import: checksums"
    with (
        stop_deferred() as asked_to_stop,
        showing(title, total, len(digests), draft.resumed, "tensor") as show,
    ):
        for step, file in enumerate(files, start=1):
            todo = [tensor for tensor in index.tensors if tensor.file == file and tensor.name not in digests]
            with closing(_digests(folder, todo, store.layer_cache)) as computed:
                for tensor, digest in computed:
                    folder.require_unchanged(file)
                    digests[tensor.name] = digest
                    read += tensor.entry.nbytes
                    show(len(digests))
                    if asked_to_stop() or tensor is todo[-1]:
                        _save(draft, step, digests)
                    if asked_to_stop():
                        stop()
    draft.facts["weights read, bytes"] = read
    tensors = (
        replace(tensor, entry=replace(tensor.entry, digest=digests[tensor.name])) for tensor in index.tensors
    )
    return replace(index, tensors=tuple(tensors))


def check_tied_copies(folder: Folder, index: CheckpointIndex) -> None:
    """Refuse weights that the configuration ties but that have different values in the files.

    Raises:
        ValueError: two tied weights differ; the message names both.
    """
    named = {tensor.name: tensor for tensor in index.tensors}
    for copy in index.tensors:
        if copy.copy_of is None:
            continue
        original = named[copy.copy_of]
        same_kind = (copy.entry.dtype, copy.entry.shape) == (original.entry.dtype, original.entry.shape)
        pair = [copy, original]
        if any(each.quantized is not None for each in pair):
            equal = same_kind and torch.equal(*read_tensors_of(folder, pair).values())
        else:
            equal = same_kind and len({digest for _, digest in _digests(folder, pair)}) == 1
        if not equal:
            raise ValueError(
                f"config.json of {folder.name} ties {copy.name} to {original.name} (tie_word_embeddings, or its default if "
                "it is missing), but their stored values differ. If the model has a head of its own, set "
                f"tie_word_embeddings to false in config.json; if not, remove {copy.name} from {copy.file}."
            )


def _digests(
    folder: Folder, tensors: Sequence[IndexedTensor], cache: LayerCache | None = None
) -> Generator[tuple[IndexedTensor, str], None, None]:
    """Yield each tensor with the digest of its bytes, and keep it in ``cache``; refuse a weight with NaN or infinity."""
    ranges = [(folder.path(tensor.file), tensor.entry.offset, tensor.entry.nbytes) for tensor in tensors]
    with closing(read_ahead(folder.fs, ranges)) as content:
        for tensor in tensors:
            digest, entry, done = xxh3_128(), tensor.entry, 0
            is_cached = cache is not None and cache.serves(folder.fs, folder.path(tensor.file))
            with cache.receiving(entry.nbytes) if cache and is_cached else nullcontext() as arriving:
                while done < entry.nbytes:
                    part = next(content)
                    digest.update(part)
                    done += len(part)
                    if tensor.is_used:
                        # The size of a piece is a multiple of every item size.
                        values = torch.frombuffer(part, dtype=entry.torch_dtype)
                        require_finite(values, tensor.name, f"{tensor.file} of {folder.name}")
                    if arriving is not None:
                        arriving.write(part)
                if arriving is not None:
                    arriving.keep(digest.hexdigest())
            yield tensor, digest.hexdigest()


def _save(draft: Draft, step: int, digests: dict[str, str]) -> None:
    content = json.dumps(digests).encode()

    def write_state(state: Draft) -> None:
        state.write(DIGESTS, content)

    draft.save_resume_point(step, write_state)
