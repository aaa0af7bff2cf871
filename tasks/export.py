"""Export: the pruned checkpoint in Hugging Face format, written layer by layer in the source's dtype."""

import json
from collections.abc import Sequence

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from layerwise.allocation import SparsityPlan, removed_per_linear
from layerwise.perplexity import perplexity
from layerwise.skeleton import Linear
from storage.artifact import Artifact
from storage.draft import Draft
from storage.keys import digest
from storage.stage import Stage
from storage.store import ArtifactStore
from storage.tensors import write_tensors
from tasks.branch import LaneScore
from tasks.capture import DENSE_PERPLEXITY
from tasks.checkpoint import Checkpoint
from tasks.checkpoint_files import copied_files
from tasks.execution import Execution
from tasks.lane_group import PruneSettings
from tasks.model_card import model_card
from tasks.progress import showing
from tasks.sources import HUB_ID, DemoSource
from tasks.statistics_table import read_statistics, statistics_identity

SPARSITY_FILE = "sparsity.json"
WEIGHTS_INDEX = "model.safetensors.index.json"


def export_stage(
    checkpoint: Checkpoint, capture: Artifact, chosen: LaneScore, uniform: LaneScore, settings: PruneSettings
) -> Stage:
    """The stage that writes the pruned checkpoint of the lane ``chosen``."""
    copied = copied_files(checkpoint.artifact.files)
    inputs = {
        "checkpoint": checkpoint.identity,
        # The identity is that of the weights; the same ones may come with another tokenizer or chat template.
        "copied files": digest({name: checkpoint.artifact.files[name].digest for name in copied}),
        "statistics": statistics_identity(_statistics_of(chosen, capture, settings)),
        "lane": chosen.artifact.key,
        "uniform": uniform.artifact.key,  # for the model card
    }
    card = {"source": source_name(checkpoint), "dense": _dense_perplexity(capture)}
    return Stage("export", 1, {"prune": settings, "card": card}, inputs)


@task(cache_policy=NO_CACHE, persist_result=False)
def export(
    store: ArtifactStore,
    checkpoint: Checkpoint,
    capture: Artifact,
    chosen: LaneScore,
    uniform: LaneScore,
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
) -> Artifact:
    """Prune by the chosen plan and write a folder that ``from_pretrained`` loads.

    Unpruned tensors, configuration and tokenizer are the source's, byte for byte; with them go
    ``sparsity.json`` (plan, realised per linear) and a model card.
    """
    statistics = _statistics_of(chosen, capture, settings)
    dense_perplexity = _dense_perplexity(capture)

    def build(draft: Draft) -> None:
        writer = _Export(store, checkpoint, statistics, chosen.plan, linears, settings, execution)
        writer.write_weights(draft)
        for name in copied_files(checkpoint.artifact.files):
            draft.write(name, store.read(checkpoint.artifact, name))
        realised = sum(row["zeros"] for row in writer.rows) / sum(row["weights"] for row in writer.rows)
        report = {
            "target": settings.target,
            "beta": chosen.plan.beta,
            "pruner": settings.pruner.method,
            "calibration": settings.calibration_mode,
            "realised": realised,
            "layers": list(chosen.plan.layers),
            "linears": writer.rows,
        }
        draft.write(SPARSITY_FILE, json.dumps(report, indent=1).encode())
        scores = {
            "dense": dense_perplexity,
            "uniform": perplexity(uniform.losses),
            "pruned": perplexity(chosen.losses),
        }
        source = source_name(checkpoint)
        draft.write("README.md", model_card(source, settings, chosen.plan.beta, realised, scores).encode())
        draft.facts |= {"beta": chosen.plan.beta, "realised sparsity": realised}

    return store.get_or_build(export_stage(checkpoint, capture, chosen, uniform, settings), build)


def source_name(checkpoint: Checkpoint) -> str:
    """What the model card calls the dense model: of a place on somebody's disk or bucket the last part only."""
    source = str(checkpoint.artifact.facts["source"])
    if source == DemoSource.label:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    on_the_hub = HUB_ID.fullmatch(source) is not None
    return source if on_the_hub else source.rstrip("/").rpartition("/")[2]


def _statistics_of(lane: LaneScore, capture: Artifact, settings: PruneSettings) -> Artifact:
    """Where the statistics lie by which ``lane`` was pruned."""
    return lane.artifact if settings.calibration_mode == "sequential" else capture


def _dense_perplexity(capture: Artifact) -> float:
    return float(str(capture.facts[DENSE_PERPLEXITY]))


class _Export:
    """A checkpoint being written, one shard per decoder layer."""

    def __init__(
        self,
        store: ArtifactStore,
        checkpoint: Checkpoint,
        statistics: Artifact,
        plan: SparsityPlan,
        linears: Sequence[Sequence[Linear]],
        settings: PruneSettings,
        execution: Execution,
    ) -> None:
        self.store, self.checkpoint, self.statistics, self.linears = store, checkpoint, statistics, linears
        self.pruner, self.device = settings.pruner, execution.torch_device
        sizes = [[linear.numel for linear in layer] for layer in linears]
        self.removed = removed_per_linear(plan, settings.target, sizes)
        self.rows: list[dict] = []  # of sparsity.json

    def write_weights(self, draft: Draft) -> None:
        """Write one shard per tensor outside of the layers (each may outweigh a layer) and one per layer."""
        outer = self.checkpoint.source_tensors().get(None, [])
        total = self.checkpoint.num_layers
        place: dict[str, str] = {}
        size = 0

        def write(tensors: dict[str, Tensor]) -> None:
            nonlocal size
            number = len(set(place.values())) + 1
            name = f"model-{number:05d}-of-{len(outer) + total:05d}.safetensors"
            write_tensors(draft, name, tensors, metadata={"format": "pt"})
            place.update(dict.fromkeys(tensors, name))
            size += sum(tensor.nbytes for tensor in tensors.values())

        for tensor in outer:
            write(self.checkpoint.read({tensor.name: tensor}))
        with showing("export: pruned checkpoint", total) as step:
            for index, weights in enumerate(self.checkpoint.layers()):
                self._prune(index, weights)
                write(self._by_source_name(index, weights))
                step(index + 1)
        document = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
        draft.write(WEIGHTS_INDEX, json.dumps(document, indent=2).encode())

    def _by_source_name(self, index: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors as the source calls them, with those that the model has no use for."""
        names = {relative: tensor.name for relative, tensor in self.checkpoint.layer_tensors(index).items()}
        group = self.checkpoint.source_tensors()[index]
        unused = {tensor.name: tensor for tensor in group if tensor.name not in names.values()}
        return {names[name]: weight for name, weight in weights.items()} | self.checkpoint.read(unused)

    @torch.no_grad()
    def _prune(self, index: int, weights: dict[str, Tensor]) -> None:
        """Zero in place what the plan removes from one layer; note what became of every linear."""
        statistics = read_statistics(self.store, self.statistics, index)
        for linear, count in zip(self.linears[index], self.removed[index], strict=True):
            weight = linear.oriented(weights[linear.weight_name])
            levels = self.pruner.removal_levels(weight.to(self.device), statistics[linear.name], [count])
            weight.masked_fill_(levels.to(weight.device) == 0, 0)
            zeros = weight.numel() - int(weight.count_nonzero())
            self.rows.append(
                {
                    "layer": index,
                    "linear": linear.name,
                    "weights": linear.numel,
                    "zeros": zeros,
                    "sparsity": zeros / linear.numel,
                }
            )
