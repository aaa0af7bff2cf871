"""Corpora: texts by name, and which part of a text serves which role."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate, combinations, pairwise

from layerwise.tasks.texts.documents import BLANK_LINE, TEXT_LIMIT, Role, Text, join_documents
from layerwise.tasks.texts.file_corpus import FileCorpus, open_file
from layerwise.tasks.texts.hub_corpus import PAPERS_NAMES, HubCorpus, open_hub
from layerwise.tasks.texts.sharded_corpus import ShardedCorpus, is_sharded, open_shards

# Roles in the order of their parts, with their shares of a corpus that all three name. Calibration gets half,
# as it needs the most windows; 1/4 of the built-in corpus is some 28 000 tokens, 55 windows of 512.
SHARES: dict[Role, Fraction] = {
    "calibration": Fraction(1, 2),
    "selection": Fraction(1, 4),
    "test": Fraction(1, 4),
}


@dataclass(frozen=True)
class BuiltinCorpus:
    """The documentation texts of this Python (``pydoc_data.topics``), which differ between its versions."""

    sha256: str

    label = "builtin"
    joint = BLANK_LINE

    @property
    def identity(self) -> dict[str, object]:
        """What a key may depend on."""
        return {"builtin": self.sha256}

    @property
    def facts(self) -> dict[str, object]:
        """What a report says about the corpus."""
        return {"corpus": self.label, **self.identity}

    def documents(self) -> Iterator[str]:
        """One document per topic, by the topics' names."""
        yield from _topics()

    def require_unchanged(self) -> None:
        """The texts of a running Python do not change."""


Corpus = BuiltinCorpus | FileCorpus | ShardedCorpus | HubCorpus


def open_corpus(name: str, role: Role) -> Corpus:
    """Find a corpus and what identifies it; the text itself is not read yet.

    Args:
        name: ``builtin``; ``hf:owner/name[/config][:split]``; ``wikitext2``, ``c4`` or ``ptb``, which are such
            names for short; or the path or fsspec URL of a ``.txt``, ``.raw``, ``.jsonl``, ``.json`` or ``.parquet``
            file, of a folder of such files, or a pattern that matches some.
        role: decides the split of a hub data set if the name does not.

    Raises:
        ValueError: a name that means nothing, a missing configuration or split.
        FileNotFoundError: there is no such file.
        ConnectionError: the hub can't be reached and the data set is not in the cache.
    """
    if name == "builtin":
        return BuiltinCorpus(hashlib.sha256("\n\n".join(_topics()).encode()).hexdigest())
    on_hub = name.startswith("hf:") and not name.startswith(
        "hf://"
    )  # that is fsspec's own, for files on the hub
    if on_hub or name in PAPERS_NAMES:
        return open_hub(name, role)
    return open_shards(name) if is_sharded(name) else open_file(name)


def read_text(corpus: Corpus, limit: int = TEXT_LIMIT) -> Text:
    """The documents of a corpus, joined as its published perplexities have it, up to ``limit`` characters.

    Raises:
        ValueError: the corpus can't be read as text; names the place.
        OSError: it changed since it was opened.
    """
    text = join_documents(corpus.documents(), corpus.label, limit, corpus.joint)
    corpus.require_unchanged()
    return text


def assign_parts(corpora: Mapping[Role, Corpus]) -> dict[Role, tuple[float, float]]:
    """The part of its corpus that each role gets: all of it, unless other roles have the same corpus.

    Roles that share a corpus (equal identity: data set, configuration, split and commit, or the same file)
    get consecutive parts that do not overlap, in the order and by the shares of ``SHARES``.

    Returns:
        For each role the start and the end of its part, as fractions of the corpus's tokens.
    """
    parts: dict[Role, tuple[float, float]] = {}
    for corpus in corpora.values():
        sharing: list[Role] = [role for role in SHARES if role in corpora and corpora[role] == corpus]
        total = sum((SHARES[role] for role in sharing), Fraction(0))
        # Exact sums, rounded once: where one part ends the next one starts, and the last one ends at 1.
        edges = accumulate((SHARES[role] / total for role in sharing), initial=Fraction(0))
        parts.update(zip(sharing, pairwise(map(float, edges)), strict=True))
    return parts


def require_apart(corpora: Mapping[Role, Corpus]) -> None:
    """Refuse corpora that have some files in common, but not all: their roles would be given the same text.

    Raises:
        ValueError: names the roles, the corpora and a file.
    """
    for (role, corpus), (other_role, other) in combinations(corpora.items(), 2):
        if corpus == other:
            continue
        if common := sorted(file.name for file in set(_files(corpus)) & set(_files(other))):
            raise ValueError(
                f"{role} ({corpus.label}) and {other_role} ({other.label}) both hold {common[0]}, so they would use "
                "the same text. Give them different files; or the same files for both: each gets a part of its own."
            )


def _files(corpus: Corpus) -> tuple[FileCorpus, ...]:
    match corpus:
        case FileCorpus():
            return (corpus,)
        case ShardedCorpus():
            return corpus.files
        case _:
            return ()


@cache
def _topics() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return tuple(topics[name] for name in sorted(topics))
