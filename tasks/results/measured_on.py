"""What a perplexity was measured on, exactly: two perplexities of different texts, windows or dtypes are no comparison.

An evaluation is known by its token ids, whatever text they were cut from. So the description is no part of it: it is
put together from the artifacts of a search, and stands in the search's result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.storage.artifact import Artifact
from layerwise.tasks.texts.documents import Role

SCORED: tuple[Role, ...] = ("selection", "test")  # the texts that perplexities are of
CONVENTION = (
    "documents joined to one text and tokenised once; consecutive windows of seqlen tokens that do not overlap, the "
    "rest dropped; the exponential of the mean over windows of the mean cross-entropy of a window's seqlen - 1 "
    "predictions (as GPTQ, SparseGPT and Wanda)"
)


@dataclass(frozen=True)
class MeasuredOn:
    """What the perplexities of one text were measured on.

    Attributes:
        corpus: the name that opens it.
        text_sha256: of the joined text's UTF-8 bytes, in hex.
        text_tokens: in all of the text.
        part_tokens: first and end of the part that the windows are cut from.
        text_starts_with_bos: whether the first token of the text is the tokenizer's BOS; windows get none of their own.
        dtype: in which the model computes.
        loss_dtype: in which cross-entropies are taken.
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
    """What the perplexities of a search were measured on, by text.

    Args:
        stages: the artifacts of the search, by role.
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
    )


def _settings(artifact: Artifact) -> Mapping[str, Any]:
    settings = artifact.recipe["settings"]
    assert isinstance(settings, dict), "a capture has settings"
    return settings
