"""Texts of a calibration mix, as the result, the report and the model card of a search show them."""

from collections.abc import Mapping
from typing import Any

from layerwise.tasks.results.roles import MIX, SOURCES

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


def text_name(facts: Mapping[str, object]) -> str:
    """Return the name of a text. The folder of a file is left out, because the name is published with the model card."""
    if isinstance(sources := facts.get(SOURCES), list):
        return ", ".join(f"{text_name(source)} ({source['windows']} windows)" for source in sources)
    corpus = str(facts.get("corpus", "unknown"))
    return corpus if corpus.startswith("hf:") else corpus.rpartition("/")[2]
