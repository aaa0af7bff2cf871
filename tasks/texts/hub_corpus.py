"""A corpus on the Hugging Face hub, pinned to a commit: streamed, or from the datasets cache when offline."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layerwise.tasks.texts.documents import BLANK_LINE, TEXT_FIELD, Role, text_of

if TYPE_CHECKING:
    from datasets import DatasetBuilder


@dataclass(frozen=True)
class Reading:
    """What of a data set is its text.

    Attributes:
        config: the one that papers mean; None for the only one there is.
        revision: a branch to read instead of ``main``.
        field: of a row, the one with the document.
        joint: what stands between two documents.
    """

    config: str | None = None
    revision: str | None = None
    field: str = TEXT_FIELD
    joint: str = BLANK_LINE


# As the published perplexities have them. C4: English, with all filters. WikiText-2: the untokenised text (the other
# one has "<unk>" and "@-@" in it). PTB: main is a script, which datasets 4 and newer refuse, so the conversion to
# Parquet by the hub is read. A row is a sentence, and the tables of pruning papers come from the code of SparseGPT (the
# "ptb-new" of GPTQ), which takes the test split and puts a space between two sentences. The "ptb" of GPTQ is another
# text: the validation split, joined by blank lines.
WELL_KNOWN = {
    "allenai/c4": Reading(config="en"),
    "Salesforce/wikitext": Reading(config="wikitext-2-raw-v1"),
    "ptb-text-only/ptb_text_only": Reading(revision="refs/convert/parquet", field="sentence", joint=" "),
}
PAPERS_NAMES = {
    "wikitext2": "hf:Salesforce/wikitext",
    "c4": "hf:allenai/c4",
    "ptb": "hf:ptb-text-only/ptb_text_only",
}

# The split for each role, and what stands in where a data set has no such split (C4 has no test, others no
# validation). Calibration and selection never take a test split while there is another one. Roles that come
# to the same split share it in parts that do not overlap (tasks/texts/corpora.py, assign_parts).
SPLITS: dict[Role, tuple[str, ...]] = {
    "calibration": ("train", "validation"),
    "selection": ("validation", "train"),
    "test": ("test", "validation", "train"),
}

NAME = re.compile(r"hf:(?P<repo>[^/:@\s]+/[^/:@\s]+)(?:/(?P<config>[^/:\s]+))?(?::(?P<split>[^/:\s]+))?")


@dataclass(frozen=True)
class HubCorpus:
    """One split of one configuration of a data set, at one commit."""

    repo: str
    config: str
    split: str
    commit: str
    note: str = field(default="", compare=False)  # why this split, if it is not the role's own

    @property
    def label(self) -> str:
        """The name that opens this corpus again."""
        return f"hf:{self.repo}/{self.config}:{self.split}"

    @property
    def identity(self) -> dict[str, object]:
        """What a key may depend on."""
        place = {"repo": self.repo, "config": self.config, "split": self.split, "commit": self.commit}
        usual = {"field": TEXT_FIELD, "joint": BLANK_LINE}
        own = {"field": self.reading.field, "joint": self.reading.joint}
        return {**place, **{name: value for name, value in own.items() if value != usual[name]}}

    @property
    def joint(self) -> str:
        """What stands between two documents."""
        return self.reading.joint

    @property
    def reading(self) -> Reading:
        """What of a row is read."""
        return reading_of(self.repo)

    @property
    def facts(self) -> dict[str, object]:
        """What a report says about the corpus."""
        return {"corpus": self.label, **self.identity, "split_note": self.note}

    def documents(self) -> Iterator[str]:
        """The rows in order, read as they are asked for.

        Raises:
            ValueError: rows without text; lists the fields that are there.
            OSError: the data set at hand is another commit.
        """
        builder = _load_builder(self.repo, self.config, self.commit)
        if builder.hash != self.commit:
            raise OSError(
                f"{self.label} was commit {self.commit} and is now {builder.hash} in the datasets cache. "
                "Start the run again to use the new one, or go online to read the old one."
            )
        # Streaming reads a cached data set too, from its Arrow files: one way for both, a batch in memory.
        for number, row in enumerate(builder.as_streaming_dataset(split=self.split), start=1):
            yield text_of(row, number, self.label, self.reading.field)

    def require_unchanged(self) -> None:
        """A commit does not change."""


def open_hub(name: str, role: Role) -> HubCorpus:
    """Find a data set's commit and split; no rows are read.

    Offline (``HF_HUB_OFFLINE=1``) the newest copy in the datasets cache is taken; its folder is named after
    the commit.

    Args:
        name: ``hf:owner/name[/config][:split]``, or one of ``PAPERS_NAMES``, which is the same corpus.
        role: decides the split if the name does not.

    Raises:
        ValueError: a name that can't be read, an unknown configuration or split; lists those there are.
        ConnectionError: the hub can't be reached and the data set is not in the cache.
    """
    match = NAME.fullmatch(PAPERS_NAMES.get(name, name))
    if match is None:
        raise ValueError(
            f"{name!r} is not the name of a hub data set. "
            "Write hf:owner/name, with /config and :split if need be, as in hf:allenai/c4/en:validation."
        )
    repo = match["repo"]
    builder = _load_builder(repo, match["config"] or reading_of(repo).config)
    # A folder ./owner/name would be taken for the data set, without a word (datasets 5.2, "Try locally").
    if builder.repo_id != repo or not builder.hash:
        raise ValueError(
            f"hf:{repo} is a local folder here, not the data set of the hub. "
            "Start from another folder, or name a file of it by its path."
        )
    label = f"hf:{repo}/{builder.config.name}"
    split, note = choose_split(role, _split_names(builder), match["split"], label)
    return HubCorpus(repo, builder.config.name, split, builder.hash, note)


def reading_of(repo: str) -> Reading:
    """What of a data set is its text: as in papers, or the field ``text`` of its only configuration."""
    return WELL_KNOWN.get(repo, Reading())


def choose_split(role: Role, splits: Sequence[str], asked: str | None, label: str) -> tuple[str, str]:
    """The split for a role: the one asked for, the first of ``SPLITS`` that exists, or the only one there is.

    Args:
        role: what the text is for.
        splits: those the data set has.
        asked: the split in the corpus's name, if any.
        label: name of the data set, for errors.

    Returns:
        The split, and a sentence if it stands in for the role's own.

    Raises:
        ValueError: there is no such split, or several that might be meant.
    """
    wanted = (asked,) if asked else SPLITS[role]
    for split in wanted:
        if split in splits:
            return split, "" if split == wanted[0] else f"for {role}: {split!r}, as there is no {wanted[0]!r}"
    if asked is None and len(splits) == 1:
        return splits[0], f"for {role}: {splits[0]!r}, the only split"
    raise ValueError(
        f"{label} has no split {' or '.join(map(repr, wanted))} for {role}, only {sorted(splits)}. "
        f"Name one of them, as in {label}:{next(iter(splits), 'train')}."
    )


def _load_builder(repo: str, config: str | None, commit: str | None = None) -> "DatasetBuilder":
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise ImportError(
            f"hf:{repo} is read with the package datasets, which is not installed. Run pip install datasets."
        ) from None
    try:
        return load_dataset_builder(repo, config, revision=commit or reading_of(repo).revision)
    except ConnectionError as error:
        raise ConnectionError(
            f"hf:{repo} can't be read: {error}. Go online, or set HF_DATASETS_CACHE to a folder that has it."
        ) from error
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"hf:{repo} can't be opened{f' with configuration {config!r}' if config else ''}: {error} "
            "Check owner and name; a configuration is named as in hf:owner/name/config."
        ) from error


def _split_names(builder: "DatasetBuilder") -> list[str]:
    # Online the data files say it; a cached data set has only the names in its dataset_info.json.
    return [str(split) for split in builder.config.data_files or builder.info.splits or ()]
