"""Speed of an exported model: what ``layerwise bench`` measured, as rows and a sentence."""

import json

from layerwise.display.byte_size import size_in
from layerwise.scoring.perplexity import format_perplexity
from layerwise.sparse.speed import Speed, SpeedTable
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore

SPEED_FILE = "speed.json"
SPEED_STAGE = "speed"


def read_speed(store: ArtifactStore, artifact: Artifact) -> SpeedTable:
    """Read an artifact of ``speed``."""
    document = json.loads(store.read(artifact, SPEED_FILE))
    return SpeedTable(**{**document, "speeds": tuple(Speed(**row) for row in document["speeds"])})


def speed_rows(table: SpeedTable) -> list[dict[str, str | int]]:
    """Return the table with numbers formatted for people."""
    return [
        {
            "way": each.way,
            "linears": each.linears,
            "weights, MB": size_in("MB", each.weight_bytes).removesuffix(" MB"),
            "new tokens/s": f"{each.decode:.3g}",
            "x torch float32": "" if each.to_float32 is None else f"{each.to_float32:.2f}",
            "x torch bfloat16": "" if each.to_bfloat16 is None else f"{each.to_bfloat16:.2f}",
            "of memory's limit": f"{100 * each.of_limit:.0f} %",
            "prompt tokens/s": f"{each.prefill:.3g}",
            "perplexity": "" if each.perplexity is None else format_perplexity(each.perplexity),
        }
        for each in table.speeds
    ]


def speed_sentence(table: SpeedTable) -> str:
    """Name the machine, and what could not be measured on it."""
    level = "no sparse kernel" if table.level is None else f"sparse kernel at {table.level}"
    threads = f"{table.threads} thread{'' if table.threads == 1 else 's'}"
    left_out = "".join(f" {way}: {reason}." for way, reason in table.left_out.items())
    return (
        f"On {table.cpu}, {threads}, {level}, memory read at {size_in('GB', table.bandwidth, 1)}/s; one text "
        f"at a time.{left_out}"
    )
