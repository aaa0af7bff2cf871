"""Import a checkpoint: find every tensor, check it against the configuration, and record its digest.

A folder is used in place; its bytes are read once to compute digests. A hub repository, a GGUF file and the demo model
are copied into the store, one shard per decoder layer, with at most one shard in memory. So is a folder with quantized
weights, which are dequantized.
"""

import json
from dataclasses import replace

from layerwise.models.prunable_linears import dense_rows
from layerwise.storage.artifact import Artifact, Damaged
from layerwise.storage.draft import Draft
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.integrity import require_whole
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.models.checkpoint import INDEX_FILE, Checkpoint
from layerwise.tasks.models.checkpoint_index import CheckpointIndex
from layerwise.tasks.models.copy_into_store import convert_gguf, copy_into_store
from layerwise.tasks.models.folder_index import (
    check_tied_copies,
    describe_folder,
    index_in_place,
    is_quantized,
    refuse_adapter,
)
from layerwise.tasks.results.roles import DENSE_LINEARS
from layerwise.tasks.sources.checkpoint_files import CONFIG, copied_files
from layerwise.tasks.sources.folder import Folder
from layerwise.tasks.sources.model_config import outline_from_document
from layerwise.tasks.sources.model_source import (
    DemoSource,
    FolderSource,
    GgufSource,
    HubSource,
    Source,
    find_source,
)
from layerwise.tasks.sources.quantized_weights import QUANTIZATION
from layerwise.tasks.sources.source_license import License, license_of_folder


def import_checkpoint(store: ArtifactStore, model: str) -> Checkpoint:
    """Import ``model`` unless the store already has it, and open it for pruning.

    Args:
        model: see ``find_source``.

    Raises:
        ValueError: the model cannot be pruned, or the files are not a model; the message says what to do.
        OSError: the model cannot be reached or read.
    """
    source = find_source(model)
    artifact = store.get_or_build(_stage(source), lambda draft: _build(store, draft, source))
    return Checkpoint(store, artifact, source.folder if isinstance(source, FolderSource) else None)


def open_exported(store: ArtifactStore, exported: Artifact) -> Checkpoint:
    """Open the checkpoint in an artifact of ``export``, and check that it is the one that was written.

    Raises:
        Damaged: a file is missing, or a tensor, the configuration or the tokenizer has different bytes.
    """
    require_whole(store, exported)
    for name in copied_files(exported.files):
        store.read(exported, name)  # checks its digest
    try:
        checkpoint = import_checkpoint(store, store.location(exported))
    except Damaged:
        raise
    except Corrupt as error:
        raise Damaged(f"{exported.key} is damaged: {error}", exported.key, exported.token) from error
    found = {tensor.name: tensor.entry.digest for tensor in checkpoint.index.tensors}
    for file in exported.files.values():
        for name, entry in (file.tensors or {}).items():
            if found.get(name) != entry.digest:
                raise Damaged(
                    f"{exported.key} is damaged: tensor {name!r} of {store.location(exported)} has digest "
                    f"{found.get(name)}, but {entry.digest} was written. Run the search again to rebuild the artifact.",
                    exported.key,
                    exported.token,
                )
    return checkpoint


def import_stage(model: str) -> Stage:
    """Describe the import of ``model``; ``store.find`` tells whether it has been imported."""
    return _stage(find_source(model))


def _stage(source: Source) -> Stage:
    if isinstance(source, FolderSource):
        refuse_adapter(source.folder)  # an adapter may have been added after the import
    return Stage("import_checkpoint", 1, source.identity)


def inspect_source(model: str) -> CheckpointIndex:
    """Read the configuration and every tensor's shape, without tensor data and without a store.

    The index has no digests, hence no identity. Places of tensors refer to the source; for GGUF there are none. The
    demo model's file is downloaded if necessary.

    Raises:
        ValueError: as ``import_checkpoint``.
        OSError: as ``import_checkpoint``.
    """
    source = find_source(model)
    match source:
        case FolderSource():
            return describe_folder(source.folder)
        case HubSource():
            return replace(describe_folder(source.open()), in_place=False)
        case GgufSource() | DemoSource():
            # gguf is slow to import, and only these sources need it.
            from layerwise.tasks.models.gguf_weights import GgufWeights

            return GgufWeights(source.local_gguf()).index


def _build(store: ArtifactStore, draft: Draft, source: Source) -> None:
    match source:
        case FolderSource() if not is_quantized(source.folder):
            index = index_in_place(store, draft, source.folder)
            _copy_small_files(draft, source.folder, index)
            found = license_of_folder(source.folder)
        case FolderSource() | HubSource():
            folder = source.folder if isinstance(source, FolderSource) else source.open()
            described = describe_folder(folder)
            check_tied_copies(folder, described)
            index = copy_into_store(store, draft, folder, described)
            _copy_small_files(draft, folder, index)
            found = license_of_folder(folder)
        case GgufSource() | DemoSource():
            from layerwise.tasks.models.gguf_weights import GgufWeights

            weights = GgufWeights(source.local_gguf())
            small_files = weights.small_files()  # first, to fail fast on a tokenizer that cannot be opened
            index = convert_gguf(store, draft, weights, source.require_unchanged)
            for name, content in small_files.items():
                draft.write(name, content)
            found = None if weights.license is None else License(weights.license)
    draft.write(INDEX_FILE, index.to_json())
    draft.facts |= {
        "source": source.label,
        "identity": index.identity,
        "num_layers": index.num_layers,
        "parameters": index.parameters,
    } | ({} if found is None else {"license": found.facts})
    if dense := dense_rows(outline_from_document(index.config, source.label)):
        draft.facts[DENSE_LINEARS] = dense


def _copy_small_files(draft: Draft, folder: Folder, index: CheckpointIndex) -> None:
    for name in copied_files(folder.files):
        content = folder.read(name)
        if name == CONFIG and QUANTIZATION in json.loads(content):
            content = json.dumps(index.config, indent=2).encode()  # the weights are dequantized
        draft.write(name, content)
