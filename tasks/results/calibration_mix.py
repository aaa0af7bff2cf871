"""Texts of a calibration, and the tokens of them that count, as the result, the report and the model card of a search show them."""

from collections.abc import Mapping
from typing import Any

from layerwise.storage.artifact import Artifact
from layerwise.tasks.results.roles import CALIBRATION_TOKENS, COUNTED, MIX, SOURCES

SOURCE_FACTS = ("corpus", "text_sha256", "text_tokens", "part_tokens", "windows", "seqlen")


def mix_rows(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for every text of a mix: corpus, hash, tokens, windows and share of the windows; nothing for one text.

    Args:
        calibration: facts of the calibration windows.
    """
    return [
        {
            **{name: source.get(name) for name in SOURCE_FACTS},
            "share": source["windows"] / calibration["windows"],
        }
        for source in calibration.get(SOURCES, ())
    ]


def published_rows(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a mix with names for publication, which are without folders."""
    return [{**row, "corpus": text_name(row)} for row in mix_rows(calibration)]


def mix_of_export(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the texts of the mix that an exported checkpoint was calibrated on; nothing for one text.

    Args:
        facts: facts of the export.
    """
    return list(facts.get(MIX, ()))


def counted_document(calibration: Artifact, capture: Artifact) -> dict[str, int]:
    """Return how many tokens of the calibration windows count, for a calibration on responses.

    Args:
        calibration: windows.
        capture: artifact of the capture, whose statistics use these tokens.
    """
    windows, seqlen = (int(str(calibration.facts[name])) for name in ("windows", "seqlen"))
    return {"counted": int(str(capture.facts[CALIBRATION_TOKENS])), "tokens": windows * seqlen}


def counted_sentence(document: Mapping[str, int]) -> str:
    """State how many tokens of a calibration on responses count; "" for a calibration on all tokens.

    Args:
        document: see ``counted_document``; empty for a calibration on all tokens.
    """
    if not document:
        return ""
    return (
        f"Of the {document['tokens']:,} tokens of the calibration windows, {document['counted']:,} counted: those of responses in "
        "conversations, and all of plain texts."
    )


def counted_of_export(facts: Mapping[str, Any]) -> str:
    """Return the sentence on the tokens that an exported checkpoint was calibrated on; "" if on all tokens.

    Args:
        facts: facts of the export.
    """
    return counted_sentence(facts.get(COUNTED, {}))


def text_name(facts: Mapping[str, object]) -> str:
    """Return the name of a text. The folder of a file is left out, because the name is published with the model card."""
    if isinstance(sources := facts.get(SOURCES), list):
        return ", ".join(f"{text_name(source)} ({source['windows']} windows)" for source in sources)
    corpus = str(facts.get("corpus", "unknown"))
    return corpus if corpus.startswith("hf:") else corpus.rpartition("/")[2]
