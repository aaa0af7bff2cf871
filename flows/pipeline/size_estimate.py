"""Estimate of the bytes that a search reads, writes and holds in memory, from shapes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PretrainedConfig

from layerwise.calibration.upper_triangle import panel_entries
from layerwise.display.byte_size import size
from layerwise.flows.pipeline.search_strategy import LaneRequest
from layerwise.flows.settings import Search
from layerwise.models.expert_names import expert_linear
from layerwise.models.layer_state import StateLayout
from layerwise.models.skeleton import Linear
from layerwise.models.streaming_check import layout_of
from layerwise.pruners.layer_pruning import MaskPruner
from layerwise.pruners.masks import RANKED_ENTRIES
from layerwise.pruners.pruning_memory import prepared_bytes, temporary_bytes
from layerwise.pruners.row_levels import SCORE_BYTES
from layerwise.recovery.layer_recovery import recovery_bytes
from layerwise.recovery.pruned_layer import held_out_windows
from layerwise.tasks.capture import SAMPLED_WINDOWS
from layerwise.tasks.models.checkpoint_index import CheckpointIndex
from layerwise.tasks.models.streamed import DTYPES, layer_sizes_of
from layerwise.tasks.running.execution import device_memory
from layerwise.tasks.sources.model_config import config_from_document
from layerwise.tasks.texts.documents import Role


@dataclass(frozen=True)
class SearchSizes:
    """Sizes of a search, in bytes.

    Attributes:
        linears: all linears of the model, by layer.
        dtype: dtype of the computation.
        plans: number of plans of the allocator.
        windows: number of windows, by role.
    """

    settings: Search
    index: CheckpointIndex
    linears: Sequence[Sequence[Linear]]
    dtype: str
    plans: int
    windows: Mapping[Role, int]

    @cached_property
    def config(self) -> PretrainedConfig:
        """Configuration of the language model."""
        return config_from_document(self.index.config, "the checkpoint").get_text_config()

    @property
    def weights(self) -> int:
        """All weights that the model computes with."""
        return sum(self.index.layer_bytes) + self.index.outer_bytes

    @property
    def files(self) -> int:
        """All tensors of the model's files, including image and sound encoders, which are only copied."""
        return sum(tensor.entry.nbytes for tensor in self.index.tensors)

    @cached_property
    def layout(self) -> StateLayout:
        """Layout of what a window carries from layer to layer."""
        config = config_from_document(self.index.config, "the checkpoint")
        return layout_of(config, self.index.outer_shapes, DTYPES[self.dtype])

    @property
    def window(self) -> int:
        """Hidden states of one window, and what else it carries from layer to layer."""
        return self.settings.seqlen * self.layout.size * DTYPES[self.dtype].itemsize

    @property
    def lane(self) -> int:
        """Hidden states of one lane of a group."""
        return self.window * (self.own_windows + self.windows["selection"])

    @property
    def beside_lanes(self) -> int:
        """Hidden states of a group in addition to its lanes.

        With recovery: the dense model's calibration windows, and twice as much while a layer is recovered. With the
        criterion kl: the dense model's output on the selection windows.
        """
        recovering = 0 if self.settings.recover is None else 3 * self.window * self.own_windows
        return recovering + (self.dense_states if self.settings.criterion == "kl" else 0)

    @property
    def own_windows(self) -> int:
        """Number of calibration windows that every lane of a search carries through its own layers."""
        if self.settings.recover is not None:
            return self.settings.windows_to_recover_on(self.windows["calibration"])
        return self.windows["calibration"] if self.settings.calibration_mode == "sequential" else 0

    def of(self, request: LaneRequest | None) -> "SearchSizes":
        """Return the sizes for lanes that are scored on the requested range of the selection windows."""
        if request is None or request.windows is None:
            return self
        first, end = request.windows
        return replace(self, windows={**self.windows, "selection": end - first})

    def hidden_states(self, together: int, request: LaneRequest | None) -> int:
        """Return the hidden states of the stage that has the most.

        Args:
            together: number of lanes in the largest group, in addition to the dense model.
            request: request that these lanes belong to.
        """
        captured = self.window * (self.windows["calibration"] + self.windows["selection"])
        lanes = together * self.of(request).lane + self.of(request).beside_lanes
        pruned = min(self.plans, 2)
        if self.settings.recover is None:
            tested = self.lane + self.window * (self.windows["test"] - self.windows["selection"])
            return max(captured, lanes, (pruned + 1) * tested)
        held_out = held_out_windows(self.settings.recover, self.windows["calibration"])
        tested = self.window * (held_out + self.windows["test"])  # by lanes with and without recovery
        # The dense model's stream and the plan's own, and two more while a layer is recovered.
        recovered = 4 * self.window * self.windows["calibration"]
        return max(captured, lanes, recovered, (2 * pruned + 1) * tested)

    @property
    def statistics(self) -> int:
        """Statistics of one calibration: 20 bytes per input channel, before compression."""
        return 20 * sum(linear.in_features for layer in self.linears for linear in layer)

    @property
    def capture(self) -> int:
        """Statistics and retained hidden states of the dense model."""
        windows = [self.windows["calibration"], self.windows["selection"]]
        kept = {"none": 0, "sampled": SAMPLED_WINDOWS, "all": sum(windows)}[self.settings.retain]
        count = sum(min(kept, number) for number in windows)
        hidden_states = self.settings.seqlen * self.layout.hidden.numel * DTYPES[self.dtype].itemsize
        return self.statistics + (self.index.num_layers + 1) * count * hidden_states

    @property
    def dense_states(self) -> int:
        """Output of the dense model on the selection windows."""
        return self.window * self.windows["selection"]

    def lanes_files(self, lanes: int) -> int:
        """Return the statistics of lanes that calibrate themselves, stored with their group and with each lane."""
        return 2 * lanes * self.statistics if self.settings.calibration_mode == "sequential" else 0

    @property
    def grams(self) -> int:
        """Stored Gram matrices of all layers; an upper bound, as linears with the same input share one matrix."""
        return sum(4 * panel_entries(width) for layer in self.linears for width in _inputs_of(layer))

    @property
    def second_moments(self) -> dict[str, int]:
        """Memory for the second moments of one layer, while they are captured or used; the same upper bound."""
        pruner = self.settings.pruner
        widest = max(
            (linear for layer in self.linears for linear in layer), key=lambda each: each.in_features
        )
        held = max(
            sum(
                4 * width**2 if isinstance(pruner, MaskPruner) else prepared_bytes(pruner, width)
                for width in _inputs_of(layer)
            )
            for layer in self.linears
        )
        return {f"second moments ({widest.name}: {size(4 * widest.in_features**2)} a matrix)": held}

    @property
    def ranking(self) -> int:
        """Memory to rank weights at once: some rows for Wanda and N:M patterns, otherwise a whole matrix."""
        entries = max(linear.numel for layer in self.linears for linear in layer)
        by_row = self.settings.pruner.method == "wanda" or self.settings.pattern is not None
        return SCORE_BYTES * (min(entries, RANKED_ENTRIES) if by_row else entries)

    def memory(self, device: str) -> tuple[dict[str, int], dict[str, int]]:
        """Return the peak memory of this machine and of the device, without hidden states and Python itself.

        Args:
            device: torch device of the computation. On the CPU, all memory is that of this machine.
        """
        largest = max(self.index.layer_bytes)
        itemsize = DTYPES[self.dtype].itemsize
        weights = max(layer_sizes_of(self.linears))
        on_cpu = device.partition(":")[0] == "cpu"
        # The layer is computed with the weights that were read, unless they are converted.
        cast = 0 if self.dtype == self.index.dtype else weights * itemsize
        restored = weights * itemsize if self.settings.calibration_mode == "sequential" else 0
        reading = {"layer arriving": largest}
        if isinstance(self.settings.pruner, MaskPruner):
            pruning, step = {"order of removal": weights}, ("ranking", self.ranking)  # one byte per weight
        else:
            # Every lane starts from the layer's dense weights, and has a mask of one byte per weight.
            stored = DTYPES[self.index.dtype].itemsize
            one = max(
                temporary_bytes(self.settings.pruner, linear, stored)
                for layer in self.linears
                for linear in layer
            )
            pruning, step = {"weights being pruned": largest + weights}, ("pruning of one linear", one)
        if self.settings.needs_grams:
            pruning = self.second_moments | pruning
            if not on_cpu:
                widest = max(linear.in_features for layer in self.linears for linear in layer)
                reading["second moments arriving"] = 4 * widest**2
        if self.settings.recover is not None:
            widest_layer = max(self.linears, key=lambda layer: sum(each.numel for each in layer))
            # A layer is recovered after it is pruned.
            recovery = "recovery", recovery_bytes(self.settings.recover, widest_layer, itemsize)
            step = max(step, recovery, key=lambda each: each[1])
        # The test runs in the same pass, so the export has a layer of its own.
        exporting = {"layer being exported": largest} if self.settings.export else {}
        models = 2 if self.settings.criterion == "kl" else 1
        computing = {
            "layer in use": largest + cast + restored,
            **({} if on_cpu else {"next layer": largest}),
            **exporting,
            **pruning,
            **dict([step]),
            "embeddings and head": self.index.outer_bytes,
            "logits of one window": models * self.settings.seqlen * self.config.vocab_size * itemsize,
        }
        return (computing | reading, {}) if on_cpu else (reading, computing)

    def require_device(self, device: torch.device) -> None:
        """Refuse a search whose layers are too large for a device, even with no hidden states on it.

        Raises:
            ValueError: the device has too little memory; the message lists what needs it.
        """
        memory = device_memory(device)
        _, needed = self.memory(device.type)
        if memory is None or sum(needed.values()) <= memory.total:
            return
        parts = ", ".join(f"{name} {size(count)}" for name, count in needed.items() if count)
        raise ValueError(
            f"this search needs about {size(sum(needed.values()))} on {device} ({parts}), which has {size(memory.total)}. A "
            "layer cannot be split over devices: use a device with more memory, the pruner wanda without recovery, which "
            "needs the least, or --device cpu."
        )


def _inputs_of(layer: Sequence[Linear]) -> list[int]:
    """Return the widths of the inputs of a layer's linears. The linears of an expert with the same width share one input."""
    widths: dict[tuple[str, int], int] = {}
    for linear in layer:
        place = expert_linear(linear.name)
        widths[linear.name if place is None else place.name, linear.in_features] = linear.in_features
    return list(widths.values())
