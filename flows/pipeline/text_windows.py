"""Token windows of a search: their number, and the part of a text that each role takes them from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.flows.settings import AUTO_WINDOWS, Search
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.sample_tokens import (
    LEAST_WINDOWS,
    TokenCount,
    TokenRequest,
    count_tokens,
    find_count,
    fitting_windows,
    keep_count,
    require_windows,
)
from layerwise.tasks.texts.corpora import assign_parts, open_corpus, require_apart
from layerwise.tasks.texts.documents import Corpus, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Texts:
    """Token counts and windows of the texts of a search.

    Attributes:
        encoding_identity: identity of the tokenizer that counted the tokens.
        counts: token counts by role.
        requests: windows of each role; "auto" is replaced by a number.
    """

    encoding_identity: str
    counts: Mapping[Role, TokenCount]
    requests: Mapping[Role, TokenRequest]

    @property
    def windows(self) -> dict[Role, int]:
        """Number of windows of each role."""
        return {role: request.windows or self.fitting(role) for role, request in self.requests.items()}

    def fitting(self, role: Role) -> int:
        """Return the number of windows that fit into the role's part of its text."""
        request = self.requests[role]
        return fitting_windows(self.counts[role].tokens, request.part, request.seqlen)

    @property
    def samples_overlap(self) -> bool:
        """Whether the calibration samples of two seeds share most of their windows."""
        return 2 * self.windows["calibration"] > self.fitting("calibration")

    def keep(self, store: ArtifactStore) -> None:
        """Commit the token counts, so that no later search has to tokenise the texts to count them."""
        for role, request in self.requests.items():
            keep_count(store, self.encoding_identity, request.corpus, self.counts[role])


def open_corpora(settings: Search) -> dict[Role, Corpus]:
    """Return the corpus of each role. Reads none of the texts.

    Raises:
        ValueError: a name is not the name of a text, or two texts have files in common.
        OSError: a text does not exist or cannot be reached.
    """
    names: dict[Role, str] = {
        "calibration": settings.calibration,
        "selection": settings.selection,
        "test": settings.test or settings.selection,
    }
    corpora = {role: open_corpus(name, role) for role, name in names.items()}
    require_apart(corpora)
    return corpora


def count_texts(
    store: ArtifactStore,
    settings: Search,
    corpora: Mapping[Role, Corpus],
    encoding_identity: str,
    load_tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    vocabulary: int,
) -> Texts:
    """Look up the token counts of the texts, count the missing ones, and check them. Writes nothing.

    Args:
        load_tokenizer: called only if a text has to be counted.
        vocabulary: number of rows of the model's embedding.

    Raises:
        ValueError: a text has too few tokens, or token ids without a row in the embedding; or a tokenizer or a text
            cannot be used.
        OSError: a text cannot be reached.
    """
    counts: dict[Role, TokenCount] = {}
    for role, corpus in corpora.items():
        same = next((each for each in counts if corpora[each] == corpus), None)
        if same is not None:
            counts[role] = counts[same]
            continue
        found = find_count(store, encoding_identity, corpus)
        counts[role] = count_tokens(corpus, load_tokenizer) if found is None else found
        _require_known_ids(settings.model, corpus, counts[role], vocabulary)
    requests = _requests(settings, corpora, counts)
    for role, request in requests.items():
        require_windows(request, counts[role].tokens, counts[role].truncated)
    return Texts(encoding_identity, counts, requests)


def _requests(
    settings: Search, corpora: Mapping[Role, Corpus], counts: Mapping[Role, TokenCount]
) -> dict[Role, TokenRequest]:
    asked: dict[Role, int | str | None] = {
        "calibration": settings.calibration_windows,
        "selection": settings.selection_windows,
        "test": settings.test_windows,
    }
    parts = assign_parts(corpora)
    requests: dict[Role, TokenRequest] = {}
    for role, corpus in corpora.items():
        windows = asked[role]
        if isinstance(windows, str):
            fitting = fitting_windows(counts[role].tokens, parts[role], settings.seqlen)
            # If fewer windows fit than the role needs, the needed number is requested, and refused with the numbers.
            windows = max(min(AUTO_WINDOWS[role], fitting), LEAST_WINDOWS[role])
        seed = settings.seed if role == "calibration" else None
        requests[role] = TokenRequest(role, corpus, windows, settings.seqlen, parts[role], seed)
    return requests


def _require_known_ids(model: str, corpus: Corpus, count: TokenCount, vocabulary: int) -> None:
    if count.largest_id >= vocabulary:
        raise ValueError(
            f"the tokenizer of {model} makes token ids up to {count.largest_id} of the text {corpus.label}, but the "
            f"model's embedding has {vocabulary} rows. Either the tokenizer belongs to another model, or the embedding "
            "was not resized for it: put the tokenizer files that belong to these weights next to them."
        )
