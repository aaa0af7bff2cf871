"""Count the tokens of a corpus: how many windows it gives, and whether a model has an embedding for all of them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.sample_tokens import tokenise
from layerwise.tasks.texts.corpora import read_text
from layerwise.tasks.texts.documents import TEXT_LIMIT, Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenCount:
    """What a tokenizer makes of a text.

    Attributes:
        tokens: number of tokens, special ones that the tokenizer adds included.
        largest_id: largest token id; -1 if there is no token.
        truncated: the corpus goes on after the last character that is read.
    """

    tokens: int
    largest_id: int
    truncated: bool


def count_tokens(corpus: Corpus, load_tokenizer: Callable[[], "PreTrainedTokenizerBase"]) -> TokenCount:
    """Read and tokenise a corpus, and count.

    Raises:
        ValueError: the text cannot be read, or the tokenizer cannot be opened.
        OSError: as ``read_text``.
    """
    tokenizer = load_tokenizer()  # first: it takes less time to fail than the text to arrive
    text = read_text(corpus)
    token_ids = tokenise(tokenizer, text.content)
    largest = int(token_ids.max()) if len(token_ids) else -1
    return TokenCount(len(token_ids), largest, text.truncated)


def count_stage(encoding_identity: str, corpus: Corpus) -> Stage:
    """The stage that holds the count of a corpus."""
    settings = {"corpus": corpus.identity, "text_limit": TEXT_LIMIT}
    return Stage("count_tokens", 1, settings, inputs={"tokenizer": encoding_identity})


def find_count(store: ArtifactStore, encoding_identity: str, corpus: Corpus) -> TokenCount | None:
    """The count that the store has; None if it has none."""
    artifact = store.find(count_stage(encoding_identity, corpus))
    if artifact is None:
        return None
    tokens, largest_id = (int(str(artifact.facts[name])) for name in ("tokens", "largest_id"))
    return TokenCount(tokens, largest_id, artifact.facts["truncated"] is True)


def keep_count(store: ArtifactStore, encoding_identity: str, corpus: Corpus, count: TokenCount) -> None:
    """Commit a count, so that no later search has to read the text for it. The artifact has facts and no files."""

    def build(draft: Draft) -> None:
        draft.facts.update(corpus.facts, **asdict(count))

    store.get_or_build(count_stage(encoding_identity, corpus), build)
