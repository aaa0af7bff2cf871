"""Sample tokens: tokenise a corpus, count its tokens, and cut windows for calibration, selection and test."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.calibration.windows import consecutive_windows, part_bounds, random_windows, require_tokens
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors, write_tensors
from layerwise.tasks.results.roles import SOURCES
from layerwise.tasks.texts.corpora import SHARES
from layerwise.tasks.texts.documents import TEXT_LIMIT, Corpus, Role
from layerwise.tasks.texts.text_mix import interleaved, proportional_shares
from layerwise.tasks.texts.token_stream import tokenise_corpus
from layerwise.tasks.texts.token_windows import INPUT_IDS, RESPONSES, TOKENS_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Plans are compared by paired differences over the selection windows, which needs at least two.
LEAST_WINDOWS: dict[Role, int] = {"calibration": 1, "selection": 2, "test": 1}


@dataclass(frozen=True)
class TokenRequest:
    """Windows of a text: everything that decides their token ids, apart from the tokenizer.

    Attributes:
        role: selection and test use consecutive windows from the start of their part, calibration random windows.
        windows: number of windows; None for all that fit (not allowed for calibration).
        seqlen: number of tokens in each window.
        part: start and end of the role's part of the corpus, as fractions of its tokens (see ``assign_parts``).
        seed: seed of the random windows; required for calibration, None for the other roles.
    """

    role: Role
    corpus: Corpus
    windows: int | None
    seqlen: int
    part: tuple[float, float] = (0.0, 1.0)
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.role not in SHARES:
            raise ValueError(f"unknown role {self.role!r}. Use one of {sorted(SHARES)}.")
        if self.seqlen < 2:
            raise ValueError(f"windows of {self.seqlen} tokens have no token to predict. Use 2 or more.")
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"{self.windows} windows were requested. Request 1 or more, or None for all.")
        start, end = self.part
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"{start} to {end} is not a valid part of {self.corpus.label}. Use 0 <= start < end <= 1."
            )
        calibrating = self.role == "calibration"
        if calibrating and self.windows is None:
            raise ValueError("calibration windows are drawn at random, but windows is None. Give a number.")
        if calibrating and (self.seed is None or not 0 <= self.seed < 2**63):
            raise ValueError(f"calibration windows need a seed, not {self.seed}. Use 0 to 2**63 - 1.")
        if not calibrating and self.seed is not None:
            raise ValueError(
                f"{self.role} windows are not random, but the seed is {self.seed}. Leave out the seed."
            )

    @property
    def sources(self) -> "tuple[TokenRequest, ...]":
        """The request itself; a mix has several."""
        return (self,)

    def with_windows(self, windows: int) -> "TokenRequest":
        """Return the request for another number of windows."""
        return replace(self, windows=windows)


@dataclass(frozen=True)
class MixRequest:
    """Calibration windows of several texts. Every beginning and every end of them has the proportions of the mix.

    Attributes:
        sources: windows of every text.
    """

    sources: tuple[TokenRequest, ...]

    def __post_init__(self) -> None:
        if len(self.sources) < 2 or {source.role for source in self.sources} != {"calibration"}:
            raise ValueError(
                f"a mix of {[source.role for source in self.sources]} texts was requested. Give two or more for calibration."
            )
        if len({source.seqlen for source in self.sources}) > 1:
            raise ValueError(
                f"the windows of a mix have {[source.seqlen for source in self.sources]} tokens. Give one length."
            )

    @property
    def role(self) -> Role:
        """Role of all texts."""
        return self.sources[0].role

    @property
    def counts(self) -> list[int]:
        """Number of windows of every text."""
        return [source.windows or 0 for source in self.sources]

    @property
    def windows(self) -> int:
        """Number of windows of all texts."""
        return sum(self.counts)

    @property
    def seqlen(self) -> int:
        """Number of tokens in each window."""
        return self.sources[0].seqlen

    def with_windows(self, windows: int) -> "MixRequest":
        """Return the request for another number of windows in the same proportions.

        Raises:
            ValueError: a text gets none of them.
        """
        shares = proportional_shares(windows, self.counts)
        if 0 in shares:
            labels = [
                source.corpus.label for source, share in zip(self.sources, shares, strict=True) if not share
            ]
            raise ValueError(
                f"{windows} windows are too few for the mix of {len(self.sources)} calibration texts: there would be none "
                f"of {', '.join(labels)}. Use more windows."
            )
        return MixRequest(
            tuple(source.with_windows(share) for source, share in zip(self.sources, shares, strict=True))
        )


WindowRequest = TokenRequest | MixRequest


def token_stage(encoding_identity: str, request: WindowRequest) -> Stage:
    """Describe the windows of a request.

    Args:
        encoding_identity: identity of the tokenizer, see ``layerwise.tasks.models.tokenizer.encoding_identity``.
    """
    if isinstance(request, MixRequest):
        keys = [token_stage(encoding_identity, source).key for source in request.sources]
        return Stage("mix_tokens", 1, None, {f"source {number}": key for number, key in enumerate(keys, 1)})
    settings = {
        "corpus": request.corpus.identity,
        "role": request.role,
        "part": list(request.part),
        "windows": request.windows,
        "seqlen": request.seqlen,
        "text_limit": TEXT_LIMIT,
    }
    if request.seed is not None:
        settings["seed"] = request.seed
    return Stage("sample_tokens", 1, settings, inputs={"tokenizer": encoding_identity})


def sample_tokens(
    store: ArtifactStore,
    load_tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    encoding_identity: str,
    request: WindowRequest,
) -> Artifact:
    """Tokenise a corpus or several and cut windows. Loads neither tokenizer nor text if the store has the windows.

    Args:
        load_tokenizer: called at most once.
        encoding_identity: identity of the tokenizer, see ``layerwise.tasks.models.tokenizer.encoding_identity``.

    Returns:
        An artifact with ``tokens.safetensors`` (``input_ids``, int64, shape ``(windows, seqlen)``) and facts about the
        text. Windows of conversations also have ``responses``, of the same shape: ``True`` for tokens that the model
        writes. Later stages use its ``content`` as input key, so equal tokens give equal keys, even from different texts.

    Raises:
        ValueError: the text is too short; the message names the corpus, its number of tokens and the tokens needed.
    """
    if isinstance(request, MixRequest):
        return _mix_tokens(store, load_tokenizer, encoding_identity, request)

    def build(draft: Draft) -> None:
        tokenizer = load_tokenizer()
        text = tokenise_corpus(request.corpus, tokenizer)
        token_ids = text.token_ids
        start, end = part_bounds(len(token_ids), request.part)
        require_windows(request, len(token_ids), text.truncated)
        input_ids = _cut_windows(token_ids[start:end], request)
        tensors = {INPUT_IDS: input_ids}
        if text.responses is not None:
            tensors[RESPONSES] = _cut_windows(text.responses[start:end], request)
            draft.facts.update(
                conversations=text.conversations, response_tokens=int(tensors[RESPONSES].sum())
            )
        write_tensors(draft, TOKENS_FILE, tensors)
        bos = tokenizer.bos_token_id
        draft.facts.update(
            request.corpus.facts,
            role=request.role,
            text_sha256=text.sha256,
            characters=text.characters,
            truncated=text.truncated,
            text_tokens=len(token_ids),
            part_tokens=[start, end],
            # By convention BOS stands at most once, before the first token of the text, and never in each window.
            text_starts_with_bos=bos is not None and token_ids[0].item() == bos,
            windows=input_ids.shape[0],
            seqlen=input_ids.shape[1],
        )

    return store.get_or_build(token_stage(encoding_identity, request), build)


def _mix_tokens(
    store: ArtifactStore,
    load_tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    encoding_identity: str,
    request: MixRequest,
) -> Artifact:
    """Sample the windows of every text of a mix, and join them."""
    load_once = cache(load_tokenizer)

    def build(draft: Draft) -> None:
        artifacts = [sample_tokens(store, load_once, encoding_identity, source) for source in request.sources]
        parts = [read_tensors(store, artifact, TOKENS_FILE) for artifact in artifacts]
        order = interleaved(request.counts)
        tensors = {INPUT_IDS: torch.cat([part[INPUT_IDS] for part in parts])[order]}
        if any(RESPONSES in part for part in parts):
            none = [torch.zeros_like(part[INPUT_IDS], dtype=torch.bool) for part in parts]
            masks = [part.get(RESPONSES, zeros) for part, zeros in zip(parts, none, strict=True)]
            tensors[RESPONSES] = torch.cat(masks)[order]
        write_tensors(draft, TOKENS_FILE, tensors)
        sources = [dict(artifact.facts) for artifact in artifacts]
        draft.facts.update(
            corpus=", ".join(f"{facts['corpus']}:{facts['windows']}" for facts in sources),
            role=request.role,
            windows=request.windows,
            seqlen=request.seqlen,
        )
        draft.facts[SOURCES] = sources

    return store.get_or_build(token_stage(encoding_identity, request), build)


def require_windows(request: TokenRequest, tokens: int, truncated: bool) -> None:
    """Refuse a text with too few tokens for a request; a request for all windows needs ``LEAST_WINDOWS`` of its role.

    Args:
        tokens: number of tokens of the whole text; the role may get only a part of them.
        truncated: whether the corpus is longer than the text that was read.

    Raises:
        ValueError: the message names the corpus, its number of tokens, the tokens needed and what to do.
    """
    start, end = part_bounds(tokens, request.part)
    cut = f" (first {TEXT_LIMIT} characters)" if truncated else ""
    share = "" if request.part == (0.0, 1.0) else f" (tokens {start} to {end} of {tokens})"
    source = f"{request.corpus.label}{cut} for {request.role}{share}"
    require_tokens(end - start, request.windows, request.seqlen, source, LEAST_WINDOWS[request.role])


def require_responses(
    store: ArtifactStore,
    load_tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    encoding_identity: str,
    request: WindowRequest,
) -> None:
    """Refuse calibration on responses if there are none. Tokenises the texts whose windows the store lacks.

    Args:
        load_tokenizer: called only if a text has to be tokenised.

    Raises:
        ValueError: no text has conversations, or a window of conversations has no response, so no token of it would count.
    """
    load_once = cache(load_tokenizer)
    masks = {source: _responses_of(store, load_once, encoding_identity, source) for source in request.sources}
    if all(mask is None for mask in masks.values()):
        texts = ", ".join(source.corpus.label for source in request.sources)
        raise ValueError(
            f"calibrate_on is responses, but {texts} has no conversations, so no token is a response. Give a text whose rows "
            "have messages, or prompt and completion, or set calibrate_on to all."
        )
    for source, mask in masks.items():
        # The first token of a window is not predicted.
        empty = 0 if mask is None else int((~mask[:, 1:].any(dim=1)).sum())
        if empty:
            raise ValueError(
                f"calibrate_on is responses, but {empty} of {source.windows} windows of {source.seqlen} tokens of "
                f"{source.corpus.label} have no response: prompts or other text fill them. Use longer windows (seqlen), "
                "another seed, conversations with longer responses, or set calibrate_on to all."
            )


def _responses_of(
    store: ArtifactStore,
    load_tokenizer: Callable[[], "PreTrainedTokenizerBase"],
    encoding_identity: str,
    request: TokenRequest,
) -> Tensor | None:
    """Return the mask of the responses in the windows of one text; None for plain text."""
    artifact = store.find(token_stage(encoding_identity, request))
    if artifact is not None:
        return read_tensors(store, artifact, TOKENS_FILE).get(RESPONSES)
    text = tokenise_corpus(request.corpus, load_tokenizer())
    if text.responses is None:
        return None
    start, end = part_bounds(len(text.token_ids), request.part)
    return _cut_windows(text.responses[start:end], request)


def fitting_windows(tokens: int, part: tuple[float, float], seqlen: int) -> int:
    """Return the number of windows that fit into a part of a text.

    Args:
        tokens: number of tokens of the whole text.
        part: start and end of the part, as fractions.
        seqlen: number of tokens in each window.
    """
    start, end = part_bounds(tokens, part)
    return (end - start) // seqlen


@dataclass(frozen=True)
class TokenCount:
    """Number of tokens that a tokenizer makes of a text.

    Attributes:
        tokens: number of tokens, including special tokens that the tokenizer adds.
        largest_id: largest token id; -1 if the text has no tokens.
        truncated: whether the corpus is longer than the text that was read.
    """

    tokens: int
    largest_id: int
    truncated: bool


def count_tokens(corpus: Corpus, load_tokenizer: Callable[[], "PreTrainedTokenizerBase"]) -> TokenCount:
    """Read and tokenise a corpus, and count its tokens.

    Raises:
        ValueError: the text cannot be read, or the tokenizer cannot be opened.
        OSError: as ``tokenise_corpus``.
    """
    text = tokenise_corpus(corpus, load_tokenizer())
    largest = int(text.token_ids.max()) if len(text.token_ids) else -1
    return TokenCount(len(text.token_ids), largest, text.truncated)


def find_count(store: ArtifactStore, encoding_identity: str, corpus: Corpus) -> TokenCount | None:
    """Return the count of a corpus that the store has; None if it has none."""
    artifact = store.find(_count_stage(encoding_identity, corpus))
    if artifact is None:
        return None
    tokens, largest_id = (int(str(artifact.facts[name])) for name in ("tokens", "largest_id"))
    return TokenCount(tokens, largest_id, artifact.facts["truncated"] is True)


def keep_count(store: ArtifactStore, encoding_identity: str, corpus: Corpus, count: TokenCount) -> None:
    """Commit a count, so that later searches need not read the text for it. The artifact has facts but no files."""

    def build(draft: Draft) -> None:
        draft.facts.update(corpus.facts, **asdict(count))

    store.get_or_build(_count_stage(encoding_identity, corpus), build)


def _count_stage(encoding_identity: str, corpus: Corpus) -> Stage:
    settings = {"corpus": corpus.identity, "text_limit": TEXT_LIMIT}
    return Stage("count_tokens", 1, settings, inputs={"tokenizer": encoding_identity})


def _cut_windows(stream: Tensor, request: TokenRequest) -> Tensor:
    """Cut the windows of a request.

    Args:
        stream: token ids or a mask of the role's part of the text, shape ``(tokens,)``.

    Returns:
        The same values, shape ``(windows, seqlen)``.
    """
    if request.windows is not None and request.seed is not None:
        return random_windows(stream, request.windows, request.seqlen, request.seed)
    return consecutive_windows(stream, request.windows, request.seqlen)
