"""Cut windows of token ids from a corpus: for calibration, for selection, for the test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.calibration.windows import consecutive_windows, part_bounds, random_windows, require_tokens
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors, write_tensors
from layerwise.tasks.texts.corpora import SHARES, read_text
from layerwise.tasks.texts.documents import TEXT_LIMIT, Corpus, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_FILE = "tokens.safetensors"
# Plans are compared by their losses on the same selection windows, paired: that takes two.
LEAST_WINDOWS: dict[Role, int] = {"calibration": 1, "selection": 2, "test": 1}


@dataclass(frozen=True)
class TokenRequest:
    """Which windows of which text. Everything that decides the token ids, apart from the tokenizer.

    Attributes:
        role: selection and test get consecutive windows from the start of their part, calibration random
            ones.
        windows: how many; None for all that fit (not for calibration).
        seqlen: tokens in each window.
        part: start and end of the role's part of the corpus, as fractions of its tokens (``assign_parts``).
        seed: of the random windows; calibration has one, the others have none.
    """

    role: Role
    corpus: Corpus
    windows: int | None
    seqlen: int
    part: tuple[float, float] = (0.0, 1.0)
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.role not in SHARES:
            raise ValueError(f"there is no role {self.role!r}. Use one of {sorted(SHARES)}.")
        if self.seqlen < 2:
            raise ValueError(f"windows of {self.seqlen} tokens hold none to predict. Use 2 or more.")
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"{self.windows} windows were asked for. Ask for one or more, or None for all.")
        start, end = self.part
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"the part {start} to {end} of {self.corpus.label} is no part. Use 0 <= start < end <= 1."
            )
        calibrating = self.role == "calibration"
        if calibrating and self.windows is None:
            raise ValueError("calibration windows are drawn at random, but windows is None. Give a number.")
        if calibrating and (self.seed is None or not 0 <= self.seed < 2**63):
            raise ValueError(f"calibration windows need a seed, not {self.seed}. Use 0 to 2**63 - 1.")
        if not calibrating and self.seed is not None:
            raise ValueError(
                f"{self.role} windows are not random, but there is a seed, {self.seed}. Leave it out."
            )


def token_stage(encoding_identity: str, request: TokenRequest) -> Stage:
    """The stage that makes these windows: ask the store for it to know whether they are there."""
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
    """Tokenise a corpus and cut windows from it; neither tokenizer nor text is loaded if the store has them.

    Args:
        store: where the windows go.
        load_tokenizer: called once, if need be.
        encoding_identity: of the tokenizer, see ``tokenizer_files.encoding_identity``.
        request: which windows of which text.

    Returns:
        An artifact with ``tokens.safetensors`` (``input_ids``, int64, shape ``(windows, seqlen)``) and with
        facts about the text. Later stages key on its ``content``, so equal token ids are equal whatever they
        were cut from.

    Raises:
        ValueError: too little text; names the corpus, the tokens there and the tokens needed.
    """

    def build(draft: Draft) -> None:
        text = read_text(request.corpus)
        tokenizer = load_tokenizer()
        token_ids = tokenise(tokenizer, text.content)
        start, end = part_bounds(len(token_ids), request.part)
        require_windows(request, len(token_ids), text.truncated)
        input_ids = cut_windows(token_ids[start:end], request)
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
            # Of the convention: at most once, before the first token of the text, never once per window.
            text_starts_with_bos=bos is not None and token_ids[0].item() == bos,
            windows=input_ids.shape[0],
            seqlen=input_ids.shape[1],
        )

    return store.get_or_build(token_stage(encoding_identity, request), build)


def require_windows(request: TokenRequest, tokens: int, truncated: bool) -> None:
    """Refuse a text that has too few tokens for the windows of a request; with all that fit, for the fewest of use.

    Args:
        tokens: number of tokens of the text, of which the role may get a part only.
        truncated: the corpus is longer than what is read of it.

    Raises:
        ValueError: names the corpus, the tokens there, the tokens needed and what to do.
    """
    start, end = part_bounds(tokens, request.part)
    cut = f", of which the first {TEXT_LIMIT} characters are read," if truncated else ""
    share = "" if request.part == (0.0, 1.0) else f" (tokens {start} to {end} of {tokens})"
    source = f"{request.corpus.label}{cut} for {request.role}{share}"
    require_tokens(end - start, request.windows, request.seqlen, source, LEAST_WINDOWS[request.role])


def fitting_windows(tokens: int, part: tuple[float, float], seqlen: int) -> int:
    """How many windows a part of a text gives.

    Args:
        tokens: number of tokens of the whole text.
        part: start and end of the part, as fractions.
        seqlen: tokens in each window.
    """
    start, end = part_bounds(tokens, part)
    return (end - start) // seqlen


def tokenise(tokenizer: "PreTrainedTokenizerBase", text: str) -> Tensor:
    """Token ids of a text as one string, with the special tokens that the tokenizer adds by default.

    Returns:
        Token ids, int64, shape ``(tokens,)``.
    """
    # verbose=False: the text is meant to be longer than the model's context; the warning would mislead.
    encoded = tokenizer(text, truncation=False, padding=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def cut_windows(token_ids: Tensor, request: TokenRequest) -> Tensor:
    """Windows of a role's part of the text.

    Args:
        token_ids: the part, shape ``(tokens,)``.
        request: decides how many windows, and whether they are random.

    Returns:
        Token ids, shape ``(windows, seqlen)``.
    """
    if request.windows is not None and request.seed is not None:
        return random_windows(token_ids, request.windows, request.seqlen, request.seed)
    return consecutive_windows(token_ids, request.windows, request.seqlen)


def read_input_ids(store: ArtifactStore, artifact: Artifact) -> Tensor:
    """Token ids of an artifact of ``sample_tokens``, int64, shape ``(windows, seqlen)``."""
    return read_tensors(store, artifact, TOKENS_FILE)["input_ids"]
