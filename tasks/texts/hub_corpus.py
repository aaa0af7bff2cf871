"""A data set on the Hugging Face hub, pinned to a commit: streamed, or read from the datasets cache when offline."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layerwise.tasks.texts.documents import BLANK_LINE, TEXT_FIELD, Corpus, Document, Role
from layerwise.tasks.texts.rows import document_of

if TYPE_CHECKING:
    from datasets import DatasetBuilder


@dataclass(frozen=True)
class DatasetDefaults:
    """Parts of a data set that make up its text.

    Attributes:
        config: configuration that papers use; None for the only one.
        revision: branch to read instead of ``main``.
        field: field of a row with the document.
        joint: separator of two documents.
    """

    config: str | None = None
    revision: str | None = None
    field: str = TEXT_FIELD
    joint: str = BLANK_LINE


# The texts of published perplexities.
# - C4: English, with all filters.
# - WikiText-2: the untokenised text (the other one contains "<unk>" and "@-@").
# - PTB: main is a script, which datasets 4 and newer refuse, so the hub's conversion to Parquet is read. A row is a
#   sentence. The tables of pruning papers come from the code of SparseGPT (the "ptb-new" of GPTQ), which uses the test
#   split and joins the sentences by spaces. The "ptb" of GPTQ is another text: the validation split, joined by blank
#   lines.
WELL_KNOWN = {
    "allenai/c4": DatasetDefaults(config="en"),
    "Salesforce/wikitext": DatasetDefaults(config="wikitext-2-raw-v1"),
    "ptb-text-only/ptb_text_only": DatasetDefaults(
        revision="refs/convert/parquet", field="sentence", joint=" "
    ),
}
PAPER_NAMES = {
    "wikitext2": "hf:Salesforce/wikitext",
    "c4": "hf:allenai/c4",
    "ptb": "hf:ptb-text-only/ptb_text_only",
}

# The split for each role, followed by replacements for data sets without it (C4 has no test split, others have no
# validation split). Calibration and selection use a test split only if it is the only one. Roles with the same split
# get parts of it that do not overlap (``layerwise.tasks.texts.corpora.assign_parts``).
SPLITS: dict[Role, tuple[str, ...]] = {
    "calibration": ("train", "validation"),
    "selection": ("validation", "train"),
    "test": ("test", "validation", "train"),
}

NAME = re.compile(r"hf:(?P<repo>[^/:@\s]+/[^/:@\s]+)(?:/(?P<config>[^/:\s]+))?(?::(?P<split>[^/:\s]+))?")


@dataclass(frozen=True)
class HubCorpus(Corpus):
    """One split of one configuration of a data set, at one commit.

    Attributes:
        note: reason for the split, if it is not the usual one of the role; else empty.
    """

    repo: str
    config: str
    split: str
    commit: str
    note: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        return f"hf:{self.repo}/{self.config}:{self.split}"

    @property
    def identity(self) -> dict[str, object]:
        place = {"repo": self.repo, "config": self.config, "split": self.split, "commit": self.commit}
        usual = {"field": TEXT_FIELD, "joint": BLANK_LINE}
        own = {"field": defaults_of(self.repo).field, "joint": self.joint}
        return {**place, **{name: value for name, value in own.items() if value != usual[name]}}

    @property
    def joint(self) -> str:
        return defaults_of(self.repo).joint

    @property
    def facts(self) -> dict[str, object]:
        return {**super().facts, "split_note": self.note}

    def documents(self) -> Iterator[Document]:
        """Yield the rows in order.

        Raises:
            ValueError: a row has no document; lists the fields that exist.
            OSError: the data set in the cache is another commit.
        """
        builder = _load_builder(self.repo, self.config, self.commit)
        if builder.hash != self.commit:
            raise OSError(
                f"{self.label} was commit {self.commit} and is now {builder.hash} in the datasets cache. "
                "Start the run again to use the new one, or go online to read the old one."
            )
        # Streaming also reads a cached data set, from its Arrow files, and holds one batch in memory.
        for number, row in enumerate(builder.as_streaming_dataset(split=self.split), start=1):
            yield document_of(row, number, self.label, defaults_of(self.repo).field)

    def require_unchanged(self) -> None:
        """Do nothing: a commit does not change."""


def open_hub(name: str, role: Role) -> HubCorpus:
    """Find the commit and the split of a data set. Reads no rows.

    Offline (``HF_HUB_OFFLINE=1``), the newest copy in the datasets cache is used; its folder is named after the
    commit.

    Args:
        name: ``hf:owner/name[/config][:split]``, or one of ``PAPER_NAMES``, which means the same corpus.
        role: decides the split if the name does not.

    Raises:
        ValueError: the name is not valid, or the configuration or split is unknown; lists the existing ones.
        ConnectionError: the hub cannot be reached and the data set is not in the cache.
    """
    match = NAME.fullmatch(PAPER_NAMES.get(name, name))
    if match is None:
        raise ValueError(
            f"{name!r} is not the name of a hub data set. "
            "Write hf:owner/name, optionally with /config and :split, as in hf:allenai/c4/en:validation."
        )
    repo = match["repo"]
    builder = _load_builder(repo, match["config"] or defaults_of(repo).config)
    # datasets (5.2, "Try locally") would silently read a local folder ./owner/name instead of the data set.
    if builder.repo_id != repo or not builder.hash:
        raise ValueError(
            f"hf:{repo} is also a local folder here, which datasets would read instead of the hub. "
            "Start layerwise in another folder, or give the path of a file in it."
        )
    label = f"hf:{repo}/{builder.config.name}"
    split, note = choose_split(role, _split_names(builder), match["split"], label)
    return HubCorpus(repo, builder.config.name, split, builder.hash, note)


def defaults_of(repo: str) -> DatasetDefaults:
    """Return the defaults of a data set: as in papers, or the field ``text`` of the only configuration."""
    return WELL_KNOWN.get(repo, DatasetDefaults())


def choose_split(role: Role, splits: Sequence[str], asked: str | None, label: str) -> tuple[str, str]:
    """Choose the split for a role: the requested one, the first of ``SPLITS`` that exists, or the only one.

    Args:
        role: purpose of the text.
        splits: splits of the data set.
        asked: split in the name of the corpus; None if it has none.
        label: name of the data set for messages.

    Returns:
        The split, and a note if it is not the usual one of the role.

    Raises:
        ValueError: there is no such split, or the choice is ambiguous.
    """
    wanted = (asked,) if asked else SPLITS[role]
    usual, *others = wanted
    if usual in splits:
        return usual, ""
    for split in others:
        if split in splits:
            return split, f"for {role}: {split!r}, because there is no {usual!r}"
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
            f"hf:{repo} needs the package datasets, which is not installed. Run pip install datasets."
        ) from None
    try:
        return load_dataset_builder(repo, config, revision=commit or defaults_of(repo).revision)
    except ConnectionError as error:
        raise ConnectionError(
            f"hf:{repo} cannot be read: {error}. Go online, or set HF_DATASETS_CACHE to a folder that has it."
        ) from error
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"hf:{repo} cannot be opened{f' with configuration {config!r}' if config else ''}: {error} "
            "Check owner and name. Write a configuration as in hf:owner/name/config."
        ) from error


def _split_names(builder: "DatasetBuilder") -> list[str]:
    # Online, the data files have the splits. A cached data set has only their names in dataset_info.json.
    return [str(split) for split in builder.config.data_files or builder.info.splits or ()]
