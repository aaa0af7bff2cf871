"""How many bytes a search needs, from shapes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PretrainedConfig

from flows.settings import Search
from layerwise.masks import SORTED_ENTRIES
from layerwise.skeleton import Linear
from tasks.capture import SAMPLED_WINDOWS
from tasks.checkpoint_index import CheckpointIndex
from tasks.documents import Role
from tasks.model_config import config_from_document
from tasks.streamed import DTYPES, layer_sizes_of


@dataclass(frozen=True)
class SearchSizes:
    """Bytes that a search needs, from shapes alone."""

    settings: Search
    index: CheckpointIndex
    linears: Sequence[Sequence[Linear]]
    dtype: str
    lanes: int
    windows: Mapping[Role, int | None]

    @cached_property
    def config(self) -> PretrainedConfig:
        return config_from_document(self.index.config, "the checkpoint").get_text_config()

    @property
    def window(self) -> int:
        """Hidden states of one window."""
        return self.settings.seqlen * self.config.hidden_size * DTYPES[self.dtype].itemsize

    @property
    def hidden_states(self) -> int:
        """Of the stage that has the most of them."""
        calibration, selection, test = (
            self.windows[role] or 0 for role in ("calibration", "selection", "test")
        )
        own = calibration if self.settings.calibration_mode == "sequential" else 0
        evaluated = min(self.lanes, 3)  # dense, uniform and best
        return self.window * max(
            calibration + selection, self.lanes * (own + selection), evaluated * (own + test)
        )

    @property
    def statistics(self) -> int:
        """Of one calibration: 20 bytes a channel, before compression."""
        return 20 * sum(linear.in_features for layer in self.linears for linear in layer)

    @property
    def capture(self) -> int:
        """Statistics and retained hidden states."""
        windows = [self.windows["calibration"] or 0, self.windows["selection"] or 0]
        kept = {"none": 0, "sampled": SAMPLED_WINDOWS, "all": sum(windows)}[self.settings.retain]
        count = sum(min(kept, number) for number in windows)
        return self.statistics + (self.index.num_layers + 1) * count * self.window

    def lanes_files(self, lanes: int) -> int:
        """Statistics of lanes that calibrate themselves, in their group's artifact and in their own."""
        return 2 * lanes * self.statistics if self.settings.calibration_mode == "sequential" else 0

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
        return {
            "layer in use": largest + cast + restored,
            "layer arriving": largest,
            "order of removal": weights + self.ranking,  # one byte a weight, and what is being sorted
            "embeddings and head": self.index.outer_bytes,
            "logits of one window": self.settings.seqlen * self.config.vocab_size * itemsize,
        }
