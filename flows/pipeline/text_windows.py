"""Token windows of a search: their number, and the part of a text that each role takes them from."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from layerwise.flows.settings import AUTO_WINDOWS, Search
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.sample_tokens import (
    LEAST_WINDOWS,
    MixRequest,
    TokenCount,
    TokenRequest,
    WindowRequest,
    count_tokens,
    find_count,
    fitting_windows,
    keep_count,
    require_responses,
    require_windows,
)
from layerwise.tasks.texts.corpora import assign_parts, open_corpus, require_apart, require_different
from layerwise.tasks.texts.documents import Corpus, Role
from layerwise.tasks.texts.text_mix import equal_or_given

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Texts:
    """Token counts and windows of the texts of a search.

    Attributes:
        encoding_identity: identity of the tokenizer that counted the tokens.
        counts: token counts of all texts.
        requests: windows of each role; "auto" is replaced by a number.
    """

    encoding_identity: str
    counts: Mapping[Corpus, TokenCount]
    requests: Mapping[Role, WindowRequest]

    @property
    def windows(self) -> dict[Role, int]:
        """Number of windows of each role."""
        return {role: sum(map(self._windows_of, request.sources)) for role, request in self.requests.items()}

    def fitting(self, request: TokenRequest) -> int:
        """Return the number of windows that fit into a request's part of its text."""
        return fitting_windows(self.counts[request.corpus].tokens, request.part, request.seqlen)

    @property
    def overlapping_sample(self) -> TokenRequest | None:
        """First calibration text of which the samples of two seeds share most of their windows; None if there is none."""
        sources = self.requests["calibration"].sources
        return next((each for each in sources if 2 * self._windows_of(each) > self.fitting(each)), None)

    def require_windows(self, request: WindowRequest) -> None:
        """Refuse a request for more windows than there are.

        Raises:
            ValueError: see ``layerwise.tasks.sample_tokens.require_windows``.
        """
        for source in request.sources:
            count = self.counts[source.corpus]
            require_windows(source, count.tokens, count.truncated)

    def keep(self, store: ArtifactStore) -> None:
        """Commit the token counts, so that no later search has to tokenise the texts to count them."""
        for corpus, count in self.counts.items():
            keep_count(store, self.encoding_identity, corpus, count)

    def _windows_of(self, request: TokenRequest) -> int:
        return request.windows or self.fitting(request)


Corpora = Mapping[Role, Sequence[Corpus]]  # texts of every role; only calibration may have several


def open_corpora(settings: Search) -> Corpora:
    """Return the texts of each role. Reads none of them.

    Raises:
        ValueError: a name is not the name of a text, or two texts have files in common.
        OSError: a text does not exist or cannot be reached.
    """
    here = settings.calibration.removeprefix("file:")
    if settings.mix and os.path.exists(here):
        path = here if os.path.isabs(here) else f"./{here}"
        raise ValueError(
            f"calibration is {settings.calibration!r}, which is a mix of {len(settings.mix)} texts, and also the name of a "
            f"file or folder. For the file or folder, write {path!r}; for the mix, write a space after each comma."
        )
    selection = open_corpus(settings.selection, "selection")
    test = open_corpus(settings.test or settings.selection, "test")
    names = [source.name for source in settings.mix] or [settings.calibration]
    calibration = [open_corpus(name, "calibration") for name in names]
    for corpus in calibration:
        require_apart({"calibration": corpus, "selection": selection, "test": test})
    for one, other in combinations(calibration, 2):
        require_different(one, other)
    return {"calibration": calibration, "selection": [selection], "test": [test]}


def count_texts(
    store: ArtifactStore,
    settings: Search,
    corpora: Corpora,
    encoding_identity: str,
    load_tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    vocabulary: int,
) -> Texts:
    """Look up the token counts of the texts, count the missing ones, and check them and the responses. Writes nothing.

    Args:
        load_tokenizer: called only if a text has to be counted.
        vocabulary: number of rows of the model's embedding.

    Raises:
        ValueError: a text has too few tokens, or no responses to calibrate on, or token ids without a row in the embedding; or a tokenizer or a text
            cannot be used.
        OSError: a text cannot be reached.
    """
    counts: dict[Corpus, TokenCount] = {}
    for corpus in (corpus for texts in corpora.values() for corpus in texts):
        if corpus not in counts:
            found = find_count(store, encoding_identity, corpus)
            counts[corpus] = count_tokens(corpus, load_tokenizer) if found is None else found
            require_known_ids(settings.model, corpus, counts[corpus].largest_id, vocabulary)
    texts = Texts(encoding_identity, counts, _requests(settings, corpora, counts))
    for request in texts.requests.values():
        texts.require_windows(request)
    if settings.calibrate_on == "responses":
        require_responses(store, load_tokenizer, encoding_identity, texts.requests["calibration"])
    return texts


def require_known_ids(model: str, corpus: Corpus, largest_id: int, vocabulary: int) -> None:
    """Refuse a text with token ids for which the model's embedding has no row.

    Args:
        largest_id: largest token id of the text.
        vocabulary: number of rows of the embedding.

    Raises:
        ValueError: names the model and the text.
    """
    if largest_id >= vocabulary:
        raise ValueError(
            f"the tokenizer of {model} makes token ids up to {largest_id} of the text {corpus.label}, but the "
            f"model's embedding has {vocabulary} rows. Either the tokenizer belongs to another model, or the embedding "
            "was not resized for it: put the tokenizer files that belong to these weights next to them."
        )


def _requests(
    settings: Search, corpora: Corpora, counts: Mapping[Corpus, TokenCount]
) -> dict[Role, WindowRequest]:
    asked: dict[Role, int | str | None] = {
        "calibration": settings.calibration_windows,
        "selection": settings.selection_windows,
        "test": settings.test_windows,
    }
    requests: dict[Role, WindowRequest] = {}
    for role, texts in corpora.items():
        parts = [_part(role, corpus, corpora) for corpus in texts]
        fitting = [
            fitting_windows(counts[corpus].tokens, part, settings.seqlen)
            for corpus, part in zip(texts, parts, strict=True)
        ]
        windows = asked[role]
        if len(texts) > 1:
            shares: Sequence[int | None] = _shares_of_mix(settings, fitting)
        elif isinstance(windows, str):
            # If fewer windows fit than the role needs, the needed number is requested, and refused with the numbers.
            shares = [max(min(AUTO_WINDOWS[role], *fitting), LEAST_WINDOWS[role])]
        else:
            shares = [windows]
        seed = settings.seed if role == "calibration" else None
        sources = tuple(
            TokenRequest(role, corpus, share, settings.seqlen, part, seed)
            for corpus, share, part in zip(texts, shares, parts, strict=True)
        )
        requests[role] = sources[0] if len(sources) == 1 else MixRequest(sources)
    return requests


def _part(role: Role, corpus: Corpus, corpora: Corpora) -> tuple[float, float]:
    """Return the role's part of a text, which other roles may also use."""
    return assign_parts({each: corpus for each, texts in corpora.items() if corpus in texts})[role]


def _shares_of_mix(settings: Search, fitting: Sequence[int]) -> tuple[int, ...]:
    """Return the number of windows of every text of a mix.

    Args:
        fitting: number of windows that fit into every text's part.
    """
    if isinstance(settings.calibration_windows, int):
        return equal_or_given(settings.mix, settings.calibration_windows)
    # As many as usual, or the largest number of which every text has its share; one of each is refused with the numbers.
    for total in range(AUTO_WINDOWS["calibration"], len(fitting), -1):
        shares = equal_or_given(settings.mix, total)
        if all(share <= most for share, most in zip(shares, fitting, strict=True)):
            return shares
    return equal_or_given(settings.mix, len(fitting))
