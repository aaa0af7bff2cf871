"""Peak memory of zero-shot tasks, streamed and with the whole model: the demo model and a random OPT, in bfloat16.

    .venv/bin/python tests/benchmarks/streamed_memory.py --folder /tmp/streamed_memory

Needs 1.5 GB of disk and a few minutes. Each way answers in a process of its own, after a tiny model that loads all
code; its peak is what that process had at most, less what it had before. Exits with 1 if the streamed way needs as much
as the other one, or log-probabilities differ by more than bfloat16 explains.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from storage.store import ArtifactStore
from storage.tables import read_table
from tasks.import_checkpoint import import_checkpoint
from tasks.task_answers import DOCUMENTS_FILE
from tests.benchmarks.memory_by_depth import memory
from tests.lm_task_files import answered, give_words, some_documents, write_task

DOCUMENTS = 40
WAYS = ("memory", "streamed")
# As OPT-350m is, but with all its width in the embedding: 24 layers of 25 MB, and 103 MB that are always there.
OPT_SHAPE = {
    "hidden_size": 1024,
    "word_embed_proj_dim": 1024,
    "ffn_dim": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 50272,
}
TINY_SHAPE = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "vocab_size": 97,
}
# Nats, for a choice of up to a dozen tokens: one of them is off by some hundredths in bfloat16.
TOLERANCE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", help="measure one model in this process")
    parser.add_argument("--way", choices=WAYS)
    arguments = parser.parse_args()
    if arguments.model:
        sys.stdout.write(json.dumps(measure(arguments.folder, arguments.model, arguments.way)))
        return
    models = {"demo": "demo", "random OPT": str(write_opt(arguments.folder / "opt", **OPT_SHAPE))}
    write_opt(arguments.folder / "tiny", **TINY_SHAPE)
    failed = False
    for name, model in models.items():
        import_checkpoint(ArtifactStore(str(arguments.folder / "store")), model)
        found = {way: _in_a_process(arguments.folder, model, way) for way in WAYS}
        whole, streamed = (found[way]["peak"] for way in WAYS)
        pairs = zip(*(found[way]["log_probabilities"] for way in WAYS), strict=True)
        difference = max(abs(one - other) for one, other in pairs)
        print(
            f"{name}: weights {found['memory']['weights'] / 1e6:.0f} MB; peak in memory {whole / 1e6:.0f} MB, streamed "
            f"{streamed / 1e6:.0f} MB ({streamed / whole:.2f}); log-probabilities differ by {difference:.2g} at most"
        )
        failed |= streamed >= whole or difference > TOLERANCE
    sys.exit(failed)


def _in_a_process(folder: Path, model: str, way: str) -> dict:
    command = [sys.executable, __file__, "--folder", folder, "--model", model, "--way", way]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def write_opt(folder: Path, **shape: int) -> Path:
    """A random OPT in bfloat16, with a tokenizer that knows the words of the tasks."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = OPTConfig(**({"num_attention_heads": 4} | shape))
        OPTForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        give_words(folder)
    return folder


def measure(folder: Path, model: str, way: str) -> dict[str, object]:
    """Bytes: the peak above the start, all weights; and the log-probability of every choice, in nats."""
    tasks = [
        write_task(folder, name, some_documents(DOCUMENTS, seed)) for seed, name in enumerate(("one", "two"))
    ]
    answer(folder / f"store-tiny-{way}", str(folder / "tiny"), tasks, way)  # loads all code
    before = memory("VmRSS")
    weights, found = answer(folder / "store", model, tasks, way)
    return {"peak": memory("VmHWM") - before, "weights": weights, "log_probabilities": found}


def answer(place: Path, model: str, tasks: list[str], way: str) -> tuple[int, list[float]]:
    """Bytes of the model's weights, and the log-probability of every choice."""
    store = ArtifactStore(str(place))
    artifacts = answered(store, Path(model), tasks, way, dtype="bfloat16").values()
    index = import_checkpoint(store, model).index
    tables = [read_table(store, artifact, DOCUMENTS_FILE).to_pylist() for artifact in artifacts]
    choices = [value for rows in tables for row in rows for value in row["log_probabilities"]]
    return sum(index.layer_bytes) + index.outer_bytes, choices


if __name__ == "__main__":
    main()
