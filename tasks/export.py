"""Export: write the pruned checkpoint in Hugging Face format, layer by layer, in the source's dtype."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.models.skeleton import Linear, auto_class, is_multimodal
from layerwise.pruners.layer_pruning import LayerPruning
from layerwise.pruners.masks import count_zeros
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Committed, Draft
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.integrity import require_whole
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import write_tensors
from layerwise.tasks.branch import plan_facts
from layerwise.tasks.lanes.lane_group import LaneInputs, LayerWatch
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.lanes.recovered_layers import RecoveredLayers
from layerwise.tasks.lanes.statistics_table import expert_rows
from layerwise.tasks.models.checkpoint_index import IndexedTensor
from layerwise.tasks.pages.model_card import Result, model_card, recovery_section
from layerwise.tasks.pages.model_card_data import (
    card_of_lane,
    results_on_test,
    source_license,
    source_name,
)
from layerwise.tasks.results.calibration_mix import (
    counted_document,
    counted_sentence,
    published_rows,
    text_name,
)
from layerwise.tasks.results.evaluation import read_recovery, read_test
from layerwise.tasks.results.lane_scores import LaneScore
from layerwise.tasks.results.roles import COUNTED, LAYERS_ROLLED_BACK, LOADED_BY, MIX, RECOVERED_BEST
from layerwise.tasks.results.run_names import model_title, plans_title
from layerwise.tasks.results.selection import dense_perplexity
from layerwise.tasks.results.summary import (
    recovery_rows,
    sentence_on_experts,
    sentences_on_dense_linears,
    sentences_on_recovery,
)
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import ProgressUpdate, showing
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sources.checkpoint_files import SPARSITY_FILE, copied_files

CARD_FILE = "README.md"
ROWS_FILE = "linears.json"  # of a resume point: the rows of sparsity.json so far
WEIGHTS_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class RecoveredExport:
    """Recovery of an exported plan.

    Attributes:
        recovered: the plan's artifact of ``recover``.
        tested: key of the artifact of ``evaluate``, with the perplexities without and with recovery for the model card.
        test: windows of the test.
    """

    recovered: Artifact
    tested: str
    test: Artifact

    def section(self, store: ArtifactStore, inputs: LaneInputs, settings: PruneSettings) -> str:
        """Return the section of the model card."""
        test = read_recovery(store, store.get(self.tested))
        assert test is not None, "the test of a search with recovery compares both"
        stages = {"calibration": inputs.calibration, "test": self.test, RECOVERED_BEST: self.recovered}
        text = sentences_on_recovery(
            settings.recovery.method, test, stages, inputs.recovery_windows, settings.calibrate_on
        )
        return recovery_section(text, recovery_rows(test))

    def results(self, store: ArtifactStore) -> tuple[Result, ...]:
        """Return the results on the test text, with the criterion ``kl`` only: the section has no divergences."""
        test = read_test(store, store.get(self.tested))
        return () if test.kl is None else results_on_test(test, self.test)


Beside = Callable[[LayerWatch, Execution], object]  # see ``export``


def export_stage(
    inputs: LaneInputs,
    chosen: LaneScore,
    uniform: LaneScore,
    settings: PruneSettings,
    recovery: RecoveredExport | None = None,
) -> Stage:
    """Describe the export of the lane ``chosen``.

    Args:
        recovery: None without recovery.
    """
    checkpoint = inputs.checkpoint
    copied = copied_files(checkpoint.artifact.files)
    by_role = {
        "checkpoint": checkpoint.identity,
        # The identity covers the weights only; equal weights may come with another tokenizer or chat template.
        "copied files": digest({name: checkpoint.artifact.files[name].digest for name in copied}),
        **_calibration_of(inputs, chosen, settings).statistics_keys(settings),
        "lane": chosen.artifact.key,
        "uniform": uniform.artifact.key,  # for the model card
    }
    if recovery is not None:
        by_role |= {"recovered": recovery.recovered.key, "tested": recovery.tested}
    card = {"source": source_name(checkpoint), "dense": dense_perplexity(inputs.capture)}
    if recovery is not None:  # the section on recovery names the texts, which equal tokens do not determine
        card["texts"] = [text_name(inputs.calibration.facts), text_name(recovery.test.facts)]
    if mix := published_rows(inputs.calibration.facts):
        card["mix"] = mix
    if (known := source_license(checkpoint)) is not None:
        card["license"] = known.facts  # left out if unknown, so that the keys of older imports stay
    return Stage("export", 1, {"prune": settings.identity, "card": card}, by_role)


@stage_task(
    about=lambda inputs, chosen, settings, **_: (
        f"{model_title(inputs.checkpoint)} at {settings.target:g}, {plans_title([chosen.plan])}"
    )
)
def export(
    store: ArtifactStore,
    inputs: LaneInputs,
    chosen: LaneScore,
    uniform: LaneScore,
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
    recovery: RecoveredExport | None = None,
    beside: Beside | None = None,
) -> Artifact:
    """Prune by the chosen plan and write a folder that ``from_pretrained`` loads.

    Unpruned tensors, configuration and tokenizer are copied from the source byte for byte. The folder also holds
    ``sparsity.json`` (the plan, the realised sparsity of every linear, and the linears that stay dense) and a model card.

    Args:
        uniform: score of the uniform plan, for the model card.
        recovery: recovery of the chosen plan; None without recovery.
        beside: runs another stage over the layers, and calls its first argument with each of them: the export uses the same
            pass over the weights. None: the export reads them itself.
    """
    checkpoint, calibrated = inputs.checkpoint, _calibration_of(inputs, chosen, settings)

    def build(draft: Draft) -> None:
        writer = _Export(store, calibrated, chosen.plan, linears, settings, execution)
        writer.write_weights(draft, beside)
        for name in copied_files(checkpoint.artifact.files):
            draft.write(name, store.read(checkpoint.artifact, name))
        realised = sum(row["zeros"] for row in writer.rows) / sum(row["weights"] for row in writer.rows)
        report = {
            "target": settings.target,
            **plan_facts(chosen.plan),
            "pruner": settings.pruner.method,
            "calibration": settings.calibration_mode,
            "realised": realised,
            "layers": list(chosen.plan.layers),
            "linears": writer.rows,
        }
        if checkpoint.dense_rows:
            report["dense"] = checkpoint.dense_rows
        section = ""
        results: tuple[Result, ...] = ()
        if recovery is not None:
            section, results = recovery.section(store, inputs, settings), recovery.results(store)
            report["recovery"] = {
                **asdict(settings.recovery),
                LAYERS_ROLLED_BACK: recovery.recovered.facts[LAYERS_ROLLED_BACK],
            }
        experts = expert_rows(store, calibrated.capture, settings.prunable(linears), settings)
        if experts:
            report["experts"] = experts
        draft.write(SPARSITY_FILE, json.dumps(report, indent=1).encode())
        loaded_by = auto_class(checkpoint.config)
        card = card_of_lane(inputs, chosen, uniform, settings, writer.rows)
        card = replace(card, results=(*card.results, *results))
        mix = published_rows(inputs.calibration.facts)
        counted = {}
        if settings.calibrate_on == "responses":
            counted = counted_document(inputs.calibration, inputs.capture)
            draft.facts[COUNTED] = counted
        content = model_card(
            card,
            "dense",
            section,
            mix=mix,
            auto_class=loaded_by,
            counted=counted_sentence(counted),
            experts=sentence_on_experts(experts),
            dense=sentences_on_dense_linears(checkpoint.dense_rows, checkpoint.num_layers),
        )
        draft.write(CARD_FILE, content.encode())
        draft.facts |= plan_facts(chosen.plan) | {"realised sparsity": realised}
        if mix:
            draft.facts[MIX] = mix
        if is_multimodal(checkpoint.config):
            draft.facts[LOADED_BY] = loaded_by

    exported = store.get_or_build(export_stage(inputs, chosen, uniform, settings, recovery), build)
    require_whole(store, exported)  # a reused export is not read by any later stage
    return exported


def _calibration_of(inputs: LaneInputs, lane: LaneScore, settings: PruneSettings) -> LaneInputs:
    """Return the inputs with the statistics that ``lane`` was pruned by; sequential lanes have their own."""
    return replace(inputs, capture=lane.artifact) if settings.calibration_mode == "sequential" else inputs


class _Export:
    """An export in progress."""

    def __init__(
        self,
        store: ArtifactStore,
        inputs: LaneInputs,
        plan: SparsityPlan,
        linears: Sequence[Sequence[Linear]],
        settings: PruneSettings,
        execution: Execution,
    ) -> None:
        self.store, self.inputs, self.linears = store, inputs, linears
        self.checkpoint, self.settings, self.execution = inputs.checkpoint, settings, execution
        self.removed = settings.removed(plan, linears)
        self.prunable = settings.prunable(linears)
        self.recovered = RecoveredLayers(store, plan, inputs, settings)
        self.rows: list[dict] = []  # of sparsity.json so far

    def write_weights(self, draft: Draft, beside: Beside | None) -> None:
        """Write one shard per layer, and one per tensor outside of the layers, which may be larger than a layer.

        The many small tensors of image and sound encoders share shards of the size of a layer.

        Args:
            beside: see ``export``.
        """
        outer = self._outer_shards()
        total = self.checkpoint.num_layers
        if draft.resumed is not None:
            self.rows += json.loads(self.store.read(draft.resumed.state, ROWS_FILE))
        written = draft.resumed.step if draft.resumed else 0  # shards

        def write(tensors: dict[str, Tensor]) -> None:
            nonlocal written
            name = f"model-{written + 1:05d}-of-{len(outer) + total:05d}.safetensors"
            write_tensors(draft, name, tensors, metadata={"format": "pt"})
            written += 1
            reached(written)

        def write_layer(index: int, weights: dict[str, Tensor]) -> None:
            self._prune(index, weights)
            write(self.checkpoint.layer_by_stored_name(index, weights))

        def write_layers_before(end: int, show: ProgressUpdate | None = None) -> None:
            first = written - len(outer)
            with closing(self.checkpoint.layers(first, self.execution.torch_device)) as layers:
                for index, weights in zip(range(first, end), layers, strict=False):
                    write_layer(index, weights)
                    if show is not None:
                        show(index + 1)

        room: dict[str, Tensor] = {}  # reused, because new memory takes longer than the copy

        def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
            for name, weight in weights.items():
                if name not in room or (room[name].dtype, room[name].shape) != (weight.dtype, weight.shape):
                    room[name] = torch.empty_like(weight)  # on the device, where it is pruned
                room[name].copy_(weight)
            return {name: room[name] for name in weights}

        def follow(index: int, weights: Mapping[str, Tensor]) -> None:
            write_layers_before(index)  # if the other stage resumed at a later layer
            if index == written - len(outer):
                write_layer(index, copied(weights))

        draft.gather()
        with boundaries(draft, self.execution, self._write_rows) as reached:
            for tensors in outer[written:]:
                write(self.checkpoint.read({tensor.name: tensor for tensor in tensors}))
            if beside is not None:
                _run_beside(beside, follow, self.execution)
            first, resumed = max(written - len(outer), 0), None if beside else draft.resumed
            if first < total:
                with showing("export: pruned checkpoint", total, first, resumed) as show:
                    write_layers_before(total, show)
        if draft.resumed is not None:
            draft.save_resume_point(len(outer) + total, self._write_rows)  # the check below takes time
            draft.check_inherited()
        draft.write(WEIGHTS_INDEX, json.dumps(_weights_index(draft), indent=2).encode())

    def _outer_shards(self) -> list[list[IndexedTensor]]:
        """Return the tensors outside of the layers, by shard."""
        tensors = self.checkpoint.source_tensors().get(None, [])
        room, has_encoders = max(self.checkpoint.index.layer_bytes), is_multimodal(self.checkpoint.config)
        shards: list[list[IndexedTensor]] = []
        for tensor in tensors:
            shares = has_encoders and not tensor.is_used and tensor.copy_of is None
            if shares and shards and not shards[-1][0].is_used and _bytes([*shards[-1], tensor]) <= room:
                shards[-1].append(tensor)
            else:
                shards.append([tensor])
        return shards

    def _write_rows(self, state: Draft) -> None:
        state.write(ROWS_FILE, json.dumps(self.rows).encode())

    @torch.no_grad()
    def _prune(self, index: int, weights: dict[str, Tensor]) -> None:
        """Prune one layer's ``weights`` in place by the plan, and add a row for every pruned linear."""
        linears = self.linears[index]
        inputs = self.inputs.of_layer(self.store, index, self.settings)
        pruning = LayerPruning(
            self.settings.pruner, self.settings.pattern_group, index, linears, weights, inputs
        )
        recovered = self.recovered.existing(index) if self.settings.recover is not None else {}
        left = [
            0 if linear.name in recovered else count
            for linear, count in zip(linears, self.removed[index], strict=True)
        ]
        pruned = pruning.pruned_weights(left, self.execution.torch_device)
        for linear, weight in zip(linears, pruned, strict=True):
            weight = recovered.get(linear.name, weight)
            if weight is not weights[linear.weight_name]:
                weights[linear.weight_name].copy_(weight)  # in place: no second copy of the layer
            if linear not in self.prunable[index]:
                continue
            zeros = int(count_zeros(weight))
            self.rows.append(
                {
                    "layer": index,
                    "linear": linear.name,
                    "weights": linear.numel,
                    "zeros": zeros,
                    "sparsity": zeros / linear.numel,
                }
            )


def _bytes(tensors: Iterable[IndexedTensor]) -> int:
    return sum(tensor.entry.nbytes for tensor in tensors)


def _run_beside(beside: Beside, follow: LayerWatch, execution: Execution) -> None:
    """Run the other stage, whose own errors are told apart from those of ``follow``.

    The store handles certain errors of a stage while it builds it: those of the export must not end up there.
    """
    failure: Exception | None = None

    def watch(index: int, weights: Mapping[str, Tensor]) -> None:
        nonlocal failure
        if failure is not None:
            return
        try:
            follow(index, weights)
        except Committed as error:  # another process has finished the export; the other stage goes on
            failure = error
        except Exception as error:
            failure = error
            raise _Failed from error

    with suppress(_Failed):
        beside(watch, execution)
    try:
        if failure is not None:
            raise failure
    finally:
        failure = None  # its traceback refers to this frame, and to the memory of the other stage


class _Failed(Exception):
    """The export has failed inside of the other stage."""


def _weights_index(shards: Draft) -> dict[str, object]:
    """Return the index that transformers reads first: the file of each tensor, and the total size in bytes."""
    place: dict[str, str] = {}
    size = 0
    for name, file in shards.files.items():
        place |= dict.fromkeys(file.tensors or (), name)
        size += sum(entry.nbytes for entry in (file.tensors or {}).values())
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
