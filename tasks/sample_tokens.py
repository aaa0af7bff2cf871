"""Sample tokens: tokenise a corpus, count its tokens, and cut windows for calibration, selection and test."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.calibration.windows import consecutive_windows, part_bounds, random_windows, require_tokens
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import write_tensors
from layerwise.tasks.texts.corpora import SHARES, read_text
from layerwise.tasks.texts.documents import TEXT_LIMIT, Corpus, Role
from layerwise.tasks.texts.token_windows import TOKENS_FILE

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


def token_stage(encoding_identity: str, request: TokenRequest) -> Stage:
    """Describe the windows of a request.

    Args:
        encoding_identity: identity of the tokenizer, see ``layerwise.tasks.models.tokenizer.encoding_identity``.
    """
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
    request: TokenRequest,
) -> Artifact:
    """Tokenise a corpus and cut windows from it. Loads neither tokenizer nor text if the store has the windows.

    Args:
        load_tokenizer: called at most once.
        encoding_identity: identity of the tokenizer, see ``layerwise.tasks.models.tokenizer.encoding_identity``.

    Returns:
        An artifact with ``tokens.safetensors`` (``input_ids``, int64, shape ``(windows, seqlen)``) and facts about the
        text. Later stages use its ``content`` as input key, so equal token ids give equal keys, even from different
        texts.

    Raises:
        ValueError: the text is too short; the message names the corpus, its number of tokens and the tokens needed.
    """

    def build(draft: Draft) -> None:
        text = read_text(request.corpus)
        tokenizer = load_tokenizer()
        token_ids = tokenise(tokenizer, text.content)
        start, end = part_bounds(len(token_ids), request.part)
        require_windows(request, len(token_ids), text.truncated)
        input_ids = _cut_windows(token_ids[start:end], request)
        write_tensors(draft, TOKENS_FILE, {"input_ids": input_ids})
        bos = tokenizer.bos_token_id
        draft.facts.update(
            request.corpus.facts,
            role=request.role,
            text_sha256=text.sha256,
            characters=len(text.content),
            truncated=text.truncated,
            text_tokens=len(token_ids),
            part_tokens=[start, end],
            # By convention BOS stands at most once, before the first token of the text, and never in each window.
            text_starts_with_bos=bos is not None and token_ids[0].item() == bos,
            windows=input_ids.shape[0],
            seqlen=input_ids.shape[1],
        )

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


def fitting_windows(tokens: int, part: tuple[float, float], seqlen: int) -> int:
    """Return the number of windows that fit into a part of a text.

    Args:
        tokens: number of tokens of the whole text.
        part: start and end of the part, as fractions.
        seqlen: number of tokens in each window.
    """
    start, end = part_bounds(tokens, part)
    return (end - start) // seqlen


def tokenise(tokenizer: "PreTrainedTokenizerBase", text: str) -> Tensor:
    """Tokenise a text as one string, with the special tokens that the tokenizer adds by default.

    Returns:
        Token ids, int64, shape ``(tokens,)``.
    """
    # verbose=False suppresses the warning about texts longer than the model's context; this text is cut later.
    encoded = tokenizer(text, truncation=False, padding=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


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
        OSError: as ``read_text``.
    """
    tokenizer = load_tokenizer()  # first, because it fails faster than the text arrives
    text = read_text(corpus)
    token_ids = tokenise(tokenizer, text.content)
    largest = int(token_ids.max()) if len(token_ids) else -1
    return TokenCount(len(token_ids), largest, text.truncated)


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


def _cut_windows(token_ids: Tensor, request: TokenRequest) -> Tensor:
    """Cut the windows of a request.

    Args:
        token_ids: the role's part of the text, shape ``(tokens,)``.

    Returns:
        Token ids, shape ``(windows, seqlen)``.
    """
    if request.windows is not None and request.seed is not None:
        return random_windows(token_ids, request.windows, request.seqlen, request.seed)
    return consecutive_windows(token_ids, request.windows, request.seqlen)
