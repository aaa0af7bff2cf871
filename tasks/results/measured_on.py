"""Text, windows and dtype that a perplexity was measured on. Perplexities can only be compared if these are equal.

The key of an evaluation contains token ids, not the text they were cut from. The description is therefore not part of
the evaluation: it is assembled from the artifacts of a search, and stored in the result of the search.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.storage.artifact import Artifact
from layerwise.tasks.texts.documents import Role

SCORED: tuple[Role, ...] = ("selection", "test")  # roles of texts that perplexities are measured on
TEXTS = "documents joined to one text and tokenised once"
CONVENTION = (
    f"{TEXTS}; consecutive windows of seqlen tokens that do not overlap, the "
    "rest dropped; the exponential of the mean over windows of the mean cross-entropy of a window's seqlen - 1 "
    "predictions (as GPTQ, SparseGPT and Wanda)"
)
CONVERSATIONS = (
    "conversations written by the model's chat template, each tokenised by itself, one after another"
)


@dataclass(frozen=True)
class MeasuredOn:
    """Conditions under which the perplexities of one text were measured.

    Attributes:
        corpus: name that opens the corpus.
        text_sha256: SHA-256 of the joined text's UTF-8 bytes, in hex.
        text_tokens: number of tokens of the whole text.
        part_tokens: range of tokens (start, end) that the windows are cut from.
        text_starts_with_bos: whether the first token of the text is the tokenizer's BOS; windows have no BOS of their
            own.
        dtype: dtype that the model computes in.
        loss_dtype: dtype that cross-entropies are computed in.
    """

    corpus: str
    text_sha256: str
    text_tokens: int
    part_tokens: tuple[int, int]
    windows: int
    seqlen: int
    text_starts_with_bos: bool
    dtype: str
    loss_dtype: str = "float32"
    convention: str = CONVENTION


def measured_on(stages: Mapping[str, Artifact]) -> dict[str, MeasuredOn]:
    """Describe what the perplexities of a search were measured on, by role of the text.

    Args:
        stages: artifacts of the search, by role.
    """
    dtype = _settings(stages["capture"])["dtype"]
    return {role: _of_text(stages[role].facts, dtype) for role in SCORED}


def summary_of(measured: MeasuredOn) -> str:
    """Summarise what perplexities were measured on, in one line."""
    first, end = measured.part_tokens
    part = "" if end - first == measured.text_tokens else f"tokens {first:,} to {end:,} of "
    bos = "BOS" if measured.text_starts_with_bos else "no BOS"
    return (
        f"{measured.corpus}: {measured.windows} windows of {measured.seqlen} tokens from {part}"
        f"{measured.text_tokens:,} ({bos} before the first), SHA-256 {measured.text_sha256[:12]}…; model in "
        f"{measured.dtype}, losses in {measured.loss_dtype}"
    )


def _of_text(facts: Mapping[str, Any], dtype: str) -> MeasuredOn:
    first, end = facts["part_tokens"]
    return MeasuredOn(
        facts["corpus"],
        facts["text_sha256"],
        facts["text_tokens"],
        (first, end),
        facts["windows"],
        facts["seqlen"],
        facts["text_starts_with_bos"],
        dtype,
        convention=CONVENTION.replace(TEXTS, CONVERSATIONS) if "conversations" in facts else CONVENTION,
    )


def _settings(artifact: Artifact) -> Mapping[str, Any]:
    settings = artifact.recipe["settings"]
    assert isinstance(settings, dict), "a capture has settings"
    return settings
