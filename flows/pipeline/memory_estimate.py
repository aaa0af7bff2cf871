"""How many bytes a search needs, from shapes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PretrainedConfig

from layerwise.display.byte_size import size
from layerwise.flows.pipeline.lane_requests import LaneRequest
from layerwise.flows.settings import Search
from layerwise.models.skeleton import Linear
from layerwise.pruners.layer_pruning import MaskPruner
from layerwise.pruners.masks import SORTED_ENTRIES
from layerwise.tasks.capture import SAMPLED_WINDOWS
from layerwise.tasks.models.checkpoint_index import CheckpointIndex
from layerwise.tasks.models.streamed import DTYPES, layer_sizes_of
from layerwise.tasks.sources.model_config import config_from_document
from layerwise.tasks.texts.documents import Role


@dataclass(frozen=True)
class SearchSizes:
    """Bytes that a search needs, from shapes alone.

    Attributes:
        plans: number of betas.
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
        return config_from_document(self.index.config, "the checkpoint").get_text_config()

    @property
    def window(self) -> int:
        """Hidden states of one window."""
        return self.settings.seqlen * self.config.hidden_size * DTYPES[self.dtype].itemsize

    @property
    def lane(self) -> int:
        """Hidden states of one lane of a group."""
        own = self.settings.calibration_mode == "sequential"
        return self.window * ((self.windows["calibration"] if own else 0) + self.windows["selection"])

    def of(self, request: LaneRequest | None) -> "SearchSizes":
        """The sizes for lanes that run on the requested part of the selection windows."""
        if request is None or request.windows is None:
            return self
        first, end = request.windows
        return replace(self, windows={**self.windows, "selection": end - first})

    def hidden_states(self, together: int, request: LaneRequest | None) -> int:
        """Of the stage that has the most of them.

        Args:
            together: how many betas the largest group has, beside the dense model.
            request: on which windows they run.
        """
        captured = self.window * (self.windows["calibration"] + self.windows["selection"])
        tested = self.lane + self.window * (self.windows["test"] - self.windows["selection"])
        return max(captured, (together + 1) * self.of(request).lane, min(self.plans + 1, 3) * tested)

    @property
    def statistics(self) -> int:
        """Of one calibration: 20 bytes a channel, before compression."""
        return 20 * sum(linear.in_features for layer in self.linears for linear in layer)

    @property
    def capture(self) -> int:
        """Statistics and retained hidden states."""
        windows = [self.windows["calibration"], self.windows["selection"]]
        kept = {"none": 0, "sampled": SAMPLED_WINDOWS, "all": sum(windows)}[self.settings.retain]
        count = sum(min(kept, number) for number in windows)
        return self.statistics + (self.index.num_layers + 1) * count * self.window

    def lanes_files(self, lanes: int) -> int:
        """Statistics of lanes that calibrate themselves, in their group's artifact and in their own."""
        return 2 * lanes * self.statistics if self.settings.calibration_mode == "sequential" else 0

    @property
    def grams(self) -> int:
        """Gram matrices of all layers: at most, as linears that share their input have one in common."""
        return sum(4 * linear.in_features**2 for layer in self.linears for linear in layer)

    @property
    def factors(self) -> int:
        """What a pruner that corrects weights holds of a layer's inputs, and what the largest of them takes to make."""
        largest = max(linear.in_features for layer in self.linears for linear in layer)
        widest = max(sum(4 * linear.in_features**2 for linear in layer) for layer in self.linears)
        return widest + 4 * 4 * largest**2

    @property
    def ranking(self) -> int:
        """Wanda ranks some rows at a time, magnitude a whole matrix: scores, order and levels of every entry."""
        entries = max(linear.numel for layer in self.linears for linear in layer)
        return 17 * (min(entries, SORTED_ENTRIES) if self.settings.pruner.method == "wanda" else entries)

    @property
    def memory(self) -> dict[str, int]:
        largest = max(self.index.layer_bytes)
        itemsize = DTYPES[self.dtype].itemsize
        weights = max(layer_sizes_of(self.linears))
        cast = 0 if self.dtype == self.index.dtype else weights * itemsize
        restored = weights * itemsize if self.settings.calibration_mode == "sequential" else 0
        if isinstance(self.settings.pruner, MaskPruner):
            how = {"order of removal": weights + self.ranking}  # one byte a weight, and what is being sorted
        else:
            # A layer's own weights, of which every lane begins; and the largest one in float32 while it is pruned.
            entries = max(linear.numel for layer in self.linears for linear in layer)
            widest = max(
                (linear for layer in self.linears for linear in layer), key=lambda each: each.in_features
            )
            one = f"second moments ({widest.name}: {size(4 * widest.in_features**2)} a matrix)"
            how = {one: self.factors, "weights being pruned": largest + 3 * 4 * entries}
        return {
            "layer in use": largest + cast + restored,
            "layer arriving": largest,
            **how,
            "embeddings and head": self.index.outer_bytes,
            "logits of one window": self.settings.seqlen * self.config.vocab_size * itemsize,
        }
