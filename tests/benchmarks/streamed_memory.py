"""Peak memory of zero-shot tasks, streamed and with the whole model: the demo model and a random OPT, in bfloat16.

    .venv/bin/python tests/benchmarks/streamed_memory.py --folder /tmp/streamed_memory

Needs 1.5 GB of disk and a few minutes. Each measurement runs in a separate process, after a tiny model that loads all
code. The peak is the largest memory of the process minus its memory before the measured model. Exits with 1 if
streaming does not need less memory. (``tests/tasks/test_zero_shot.py`` tests that both give the same numbers.)
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import import_checkpoint
from tests.benchmarks.memory_by_depth import memory
from tests.lm_task_files import answered, give_words, some_documents, write_task

DOCUMENTS = 40
WAYS = ("memory", "streamed")
# Like OPT-350m, but with a full-width embedding: 24 layers of 25 MB, and 103 MB outside the layers.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", help="measure one model in this process")
    parser.add_argument("--way", choices=WAYS)
    arguments = parser.parse_args()
    if arguments.model:
        sys.stdout.write(str(measure(arguments.folder, arguments.model, arguments.way)))
        return
    models = {"demo": "demo", "random OPT": str(write_opt(arguments.folder / "opt", **OPT_SHAPE))}
    write_opt(arguments.folder / "tiny", **TINY_SHAPE)
    failed = False
    for name, model in models.items():
        index = import_checkpoint(ArtifactStore(str(arguments.folder / "store")), model).index
        whole, streamed = (_in_a_process(arguments.folder, model, way) for way in WAYS)
        weights = sum(index.layer_bytes) + index.outer_bytes
        print(
            f"{name}: weights {weights / 1e6:.0f} MB; peak in memory {whole / 1e6:.0f} MB, streamed "
            f"{streamed / 1e6:.0f} MB ({streamed / whole:.2f})"
        )
        failed |= streamed >= whole
    sys.exit(failed)


def _in_a_process(folder: Path, model: str, way: str) -> int:
    command = [sys.executable, __file__, "--folder", str(folder), "--model", model, "--way", way]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def write_opt(folder: Path, **shape: Any) -> Path:
    """Write a random OPT in bfloat16, with a tokenizer for the words of the tasks."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = OPTConfig(**({"num_attention_heads": 4} | shape))
        OPTForCausalLM(config).bfloat16().save_pretrained(folder)
        give_words(folder)
    return folder


def measure(folder: Path, model: str, way: str) -> int:
    """Return the peak memory above the start, in bytes."""
    tasks = [
        write_task(folder, name, some_documents(DOCUMENTS, seed)) for seed, name in enumerate(("one", "two"))
    ]
    # Loads all code.
    answered(ArtifactStore(str(folder / f"store-tiny-{way}")), folder / "tiny", tasks, way, dtype="bfloat16")
    before = memory("VmRSS")
    answered(ArtifactStore(str(folder / "store")), Path(model), tasks, way, dtype="bfloat16")
    return memory("VmHWM") - before


if __name__ == "__main__":
    main()
