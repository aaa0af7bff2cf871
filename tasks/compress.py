"""Compress: write the exported or the distilled checkpoint without its zeros, shard by shard."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from layerwise.models.skeleton import is_multimodal, layer_prefix
from layerwise.storage.artifact import Artifact, StoredFile
from layerwise.storage.draft import Draft
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.storage.integrity import require_whole
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors, write_tensors
from layerwise.tasks.compressed.compressed_folder import model_names
from layerwise.tasks.compressed.file_format import (
    FORMAT,
    LAYOUT_FILE,
    LAYOUT_TEXT,
    Description,
    Layout,
    SparseTensor,
    compressed,
    parts_of,
)
from layerwise.tasks.export import CARD_FILE
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.pages.model_card import ModelCard, model_card
from layerwise.tasks.results.calibration_mix import counted_of_export, mix_of_export
from layerwise.tasks.results.distillation import read_distillation
from layerwise.tasks.results.run_names import title_of
from layerwise.tasks.results.summary import sentence_on_experts, sentences_on_dense_linears
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sources.checkpoint_files import (
    CONFIG,
    DESCRIPTION_FILE,
    SPARSITY_FILE,
    StoredTensor,
    copied_files,
)
from layerwise.tasks.sources.model_config import outline_from_document


def compress_stage(
    checkpoint_key: str,
    card: ModelCard,
    recovery: str = "",
    tasks: Sequence[Mapping[str, str]] = (),
    distillation: str = "",
) -> Stage:
    """Describe the compression of an exported or a distilled checkpoint, given by its key.

    Args:
        recovery: section on the recovery in README.md; empty without recovery.
        tasks: table of few-shot tasks in README.md; empty if there is none.
        distillation: how the checkpoint was distilled; empty if it is an export.
    """
    sections: dict[str, object] = {"recovery": recovery, "distillation": distillation}
    if tasks:
        sections["tasks"] = [dict(row) for row in tasks]
    present = {name: section for name, section in sections.items() if section}
    role = "distill" if distillation else "export"
    return Stage("compress", 1, {"card": card, **present}, {role: checkpoint_key})


def require_compressible(checkpoint: Checkpoint) -> None:
    """Refuse a model that the compressed format cannot hold.

    Raises:
        ValueError: the model is multimodal, or is stored in another layout than it has in memory, such as experts that
            are stored in one tensor per layer.
    """
    kind = "is multimodal" if is_multimodal(checkpoint.config) else ""
    if not kind:
        try:
            checkpoint.parameter_names  # noqa: B018 (raises)
        except ValueError as error:
            kind = f"is stored in another layout than it has in memory ({error})"
    if kind:
        raise ValueError(
            f"{checkpoint.config.model_type} {kind}: such a model cannot be stored without its zeros. Use the exported or "
            "the distilled folder as it is."
        )


@stage_task(about=lambda card, **_: f"{title_of(card.base_model)} at {card.realised:.3g}")
def compress(
    store: ArtifactStore,
    exported: Artifact,
    card: ModelCard,
    execution: Execution,
    recovery: str = "",
    tasks: Sequence[Mapping[str, str]] = (),
    distilled: Artifact | None = None,
) -> Artifact:
    """Write a checkpoint to a new folder, with every pruned weight stored without its zeros where that is smaller.

    Configuration, tokenizer and ``sparsity.json`` stay the same. ``compressed.json`` maps stored tensors to weights;
    ``COMPRESSED.md`` describes the format. transformers refuses the folder, because it finds no weights under their
    usual names; ``layerwise.tasks.compressed.checkpoint`` opens it.

    Args:
        exported: the pruned checkpoint, an artifact of ``export``. It is written unless ``distilled`` is given.
        card: content of README.md, with the results of the written checkpoint.
        recovery: section on the recovery in README.md; empty without recovery.
        tasks: table of few-shot tasks in README.md; empty if there is none.
        distilled: the checkpoint that was distilled from ``exported``, to be written instead.
    """
    written = exported if distilled is None else distilled
    distillation = "" if distilled is None else read_distillation(store, distilled).sentence

    def build(draft: Draft) -> None:
        shards = _shards(written)
        report = json.loads(store.read(written, SPARSITY_FILE))
        pruned = _pruned_weights(report["linears"], written, json.loads(store.read(written, CONFIG)))
        _write_shards(store, draft, written, shards, pruned, execution)
        for name in (*copied_files(written.files), SPARSITY_FILE):
            draft.write(name, store.read(written, name))
        sizes = _sizes(written, draft, shards, pruned)
        description = Description(tuple(shards.values()), _sparse_tensors(written, draft, shards), sizes)
        draft.write(DESCRIPTION_FILE, description.to_json())
        draft.write(LAYOUT_FILE, LAYOUT_TEXT.encode())
        # A distilled checkpoint has these facts in its export only.
        mix, counted = mix_of_export(exported.facts), counted_of_export(exported.facts)
        dense = sentences_on_dense_linears(report.get("dense", ()), len(report["layers"]))
        content = model_card(
            card,
            "compressed",
            recovery,
            distillation,
            mix=mix,
            counted=counted,
            tasks=tasks,
            dense=dense,
            experts=sentence_on_experts(report.get("experts", ())),
        )
        draft.write(CARD_FILE, content.encode())
        draft.facts |= sizes

    stage = compress_stage(written.key, card, recovery, tasks, distillation)
    result = store.get_or_build(stage, build)
    require_whole(store, result)  # a reused artifact is not read by any later stage
    return result


def _shards(exported: Artifact) -> dict[str, str]:
    """Map the exported tensor files to their names in the compressed folder.

    The new names do not start with "model-": transformers and others would take such a file for weights they can load.
    """
    dense = sorted(name for name in exported.files if name.endswith(".safetensors"))
    return {name: name.replace("model-", "compressed-", 1) for name in dense}


def _pruned_weights(
    rows: Iterable[Mapping[str, object]], exported: Artifact, config: Mapping[str, Any]
) -> frozenset[str]:
    """Return the names of the pruned weights in the exported files.

    Args:
        rows: layer and name of the pruned linears.
        config: content of ``config.json``.
    """
    stored = {
        name: StoredTensor(file, entry)
        for file in exported.files
        if file.endswith(".safetensors")
        for name, entry in _tensors(exported.files[file]).items()
    }
    pruned = {f"{row['layer']}.{row['linear']}.weight" for row in rows}
    prefix = f"{layer_prefix(outline_from_document(config, exported.key))}."
    return frozenset(
        stored_name
        for stored_name, name in model_names(stored, config, exported.key).items()
        if name.startswith(prefix) and name.removeprefix(prefix) in pruned
    )


def _write_shards(
    store: ArtifactStore,
    draft: Draft,
    exported: Artifact,
    shards: Mapping[str, str],
    pruned: Collection[str],
    execution: Execution,
) -> None:
    """Write one file per exported file, with one compressed file and one dense tensor in memory."""
    done = draft.resumed.step if draft.resumed else 0
    draft.gather()
    with (
        boundaries(draft, execution, _no_state) as reached,
        showing("compress: checkpoint without zeros", len(shards), done, draft.resumed, "shard") as show,
    ):
        for step, (source, target) in enumerate([*shards.items()][done:], done + 1):
            tensors: dict[str, Tensor] = {}
            for name in _tensors(exported.files[source]):
                # One at a time: the tensors of one read share their memory, and any of them keeps all of it.
                (weight,) = read_tensors(store, exported, source, [name]).values()
                tensors |= compressed(name, weight) if name in pruned else {name: weight}
            write_tensors(draft, target, tensors, metadata={"format": FORMAT})
            show(step)
            reached(step)
    if draft.resumed is not None:
        draft.save_resume_point(len(shards), _no_state)  # the check below takes time
        draft.check_inherited()


def _no_state(state: Draft) -> None:
    """Write nothing: the shards written so far are all that a resume point needs."""


def _sparse_tensors(exported: Artifact, draft: Draft, shards: Mapping[str, str]) -> dict[str, SparseTensor]:
    """Describe the weights that are stored as two tensors, from the headers of the files."""
    found = {}
    for source, target in shards.items():
        dense, stored = _tensors(exported.files[source]), _tensors(draft.files[target])
        for name in dense.keys() - stored.keys():
            layout: Layout = "bitmask" if parts_of(name, "bitmask")[0] in stored else "semi_structured"
            rows, columns = dense[name].shape
            dtype = str(dense[name].torch_dtype).removeprefix("torch.")
            found[name] = SparseTensor(target, (rows, columns), dtype, layout)
    return dict(sorted(found.items()))


def _sizes(
    exported: Artifact, draft: Draft, shards: Mapping[str, str], pruned: Collection[str]
) -> dict[str, float]:
    """Return the bytes of all tensors, and of the pruned linears, the only tensors that become smaller."""
    dense = {name: entry for source in shards for name, entry in _tensors(exported.files[source]).items()}
    before = sum(entry.nbytes for entry in dense.values())
    after = sum(
        entry.nbytes for target in shards.values() for entry in _tensors(draft.files[target]).values()
    )
    linears = sum(entry.nbytes for name, entry in dense.items() if name in pruned)
    left = linears - (before - after)
    return {
        "dense bytes": before,
        "compressed bytes": after,
        "ratio": after / before,
        "dense bytes of linears": linears,
        "compressed bytes of linears": left,
        "ratio of linears": left / linears,
    }


def _tensors(file: StoredFile) -> dict[str, TensorEntry]:
    assert file.tensors is not None, "write_tensors records the place of every tensor"
    return file.tensors
