"""Corpora by name, and the part of a corpus that each role gets."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate, chain, combinations, pairwise

from layerwise.tasks.texts.documents import (
    TEXT_LIMIT,
    Conversation,
    Conversations,
    Corpus,
    Role,
    Text,
    collect_conversations,
    join_documents,
)
from layerwise.tasks.texts.file_corpus import FileCorpus, open_file
from layerwise.tasks.texts.hub_corpus import PAPER_NAMES, open_hub
from layerwise.tasks.texts.sharded_corpus import ShardedCorpus, is_sharded, open_shards

# Roles in the order of their parts, and the share of each if all three have the same corpus. Calibration gets half,
# because it needs the most windows. 1/4 of the built-in corpus is about 28 000 tokens, 55 windows of 512.
SHARES: dict[Role, Fraction] = {
    "calibration": Fraction(1, 2),
    "selection": Fraction(1, 4),
    "test": Fraction(1, 4),
}


@dataclass(frozen=True)
class BuiltinCorpus(Corpus):
    """The documentation of Python (``pydoc_data.topics``). It differs between versions of Python."""

    sha256: str

    label = "builtin"

    @property
    def identity(self) -> dict[str, object]:
        return {"builtin": self.sha256}

    def documents(self) -> Iterator[str]:
        """Yield one document per topic, sorted by the names of the topics."""
        yield from _topics()

    def require_unchanged(self) -> None:
        """Do nothing: the documentation does not change while Python runs."""


def open_corpus(name: str, role: Role) -> Corpus:
    """Find a corpus and its identity, without reading the whole text.

    Args:
        name: ``builtin``; ``hf:owner/name[/config][:split]``; ``wikitext2``, ``c4`` or ``ptb``, which are short for
            such names; or the path or fsspec URL of a ``.txt``, ``.raw``, ``.jsonl``, ``.json`` or ``.parquet``
            file, of a folder of such files, or a pattern that matches such files.
        role: decides the split of a hub data set if the name does not.

    Raises:
        ValueError: the name is not that of a corpus, or the configuration or split does not exist.
        FileNotFoundError: there is no such file.
        ConnectionError: the hub cannot be reached and the data set is not in the cache.
    """
    if name == "builtin":
        return BuiltinCorpus(hashlib.sha256("\n\n".join(_topics()).encode()).hexdigest())
    # hf:// is fsspec's protocol for files on the hub.
    on_hub = name.startswith("hf:") and not name.startswith("hf://")
    if on_hub or name in PAPER_NAMES:
        return open_hub(name, role)
    return open_shards(name) if is_sharded(name) else open_file(name)


def read_text(corpus: Corpus, limit: int = TEXT_LIMIT) -> Text | Conversations:
    """Read the documents of a corpus up to ``limit`` characters. Texts are joined as for published perplexities.

    Raises:
        ValueError: the corpus cannot be read as text; names the position.
        OSError: the corpus has changed since it was opened.
    """
    documents = corpus.documents()
    first = next(documents, None)
    everything = documents if first is None else chain((first,), documents)
    text: Text | Conversations
    if isinstance(first, Conversation):
        text = collect_conversations(everything, corpus.label, limit)
    else:
        text = join_documents(everything, corpus.label, limit, corpus.joint)
    corpus.require_unchanged()
    return text


def assign_parts(corpora: Mapping[Role, Corpus]) -> dict[Role, tuple[float, float]]:
    """Assign a part of its corpus to each role: all of it, unless other roles have the same corpus.

    Roles that share a corpus (equal identity: data set, configuration, split and commit, or the same file)
    get consecutive parts that do not overlap. ``SHARES`` has their order and sizes.

    Returns:
        Start and end of the part of each role, as fractions of the tokens of its corpus.
    """
    parts: dict[Role, tuple[float, float]] = {}
    for corpus in corpora.values():
        sharing: list[Role] = [role for role in SHARES if role in corpora and corpora[role] == corpus]
        total = sum((SHARES[role] for role in sharing), Fraction(0))
        # Exact sums, rounded once: each part starts where the one before ends, and the last one ends at 1.
        edges = accumulate((SHARES[role] / total for role in sharing), initial=Fraction(0))
        parts.update(zip(sharing, pairwise(map(float, edges)), strict=True))
    return parts


def require_apart(corpora: Mapping[Role, Corpus]) -> None:
    """Refuse different corpora with common files: their roles would use the same text.

    Raises:
        ValueError: names the roles, the corpora and one common file.
    """
    for (role, corpus), (other_role, other) in combinations(corpora.items(), 2):
        if corpus == other:
            continue
        if common := sorted(file.name for file in set(_files(corpus)) & set(_files(other))):
            raise ValueError(
                f"{role} ({corpus.label}) and {other_role} ({other.label}) both contain {common[0]}, so they would use "
                "the same text. Give them different files, or exactly the same files, which are then split into parts."
            )


def require_different(one: Corpus, other: Corpus) -> None:
    """Refuse a mix that has a text twice, as a whole or by a common file.

    Raises:
        ValueError: names the corpora, and a common file.
    """
    common = sorted(file.name for file in set(_files(one)) & set(_files(other)))
    if one == other or common:
        what = f"both contain {common[0]}" if common and one != other else "are the same text"
        raise ValueError(
            f"two texts of the calibration mix, {one.label} and {other.label}, {what}. Name every text once."
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
