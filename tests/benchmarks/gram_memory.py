"""Peak memory of the pruners that use second moments, compared with `plan`: one random layer, in bfloat16.

    OMP_NUM_THREADS=1 PYTHONPATH=. .venv/bin/python tests/benchmarks/gram_memory.py --folder /tmp/gram_memory

Needs 1 GB of disk and about five minutes. The layer has 1024 hidden and 4096 intermediate channels. For each pruner, a
separate process runs import, capture, grams, branch and export, first on a tiny model that loads all code. The peak is
the largest memory of the process minus its memory before the large model. Exits with 1 if `plan` states less than a
peak, or over 15 % more.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from layerwise.allocators.atp import arithmetic
from layerwise.flows.pipeline.size_estimate import SearchSizes
from layerwise.flows.settings import Search
from layerwise.pruners.alps import ALPS
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.pruners.wanda_swaps import WandaSwaps
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.branch import branch
from layerwise.tasks.capture import CaptureSettings, capture
from layerwise.tasks.capture_grams import capture_grams
from layerwise.tasks.export import export
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.lanes.lane_group import LaneInputs
from layerwise.tasks.models.streamed import layer_sizes_of, linears_by_layer
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.texts.documents import Role
from tests.benchmarks.memory_by_depth import SEQLEN, WINDOWS, memory, tokens, write_model

# The number of steps does not matter for the memory.
PRUNERS: dict[str, SparseGPT | ALPS | WandaSwaps] = {
    "sparsegpt": SparseGPT(),
    "alps": ALPS(iterations=1, refit_steps=1),
    "wanda_swaps": WandaSwaps(),
}
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "vocab_size": 2048}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 512}
SPARSITY = 0.5
TOLERANCE = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--pruner", choices=PRUNERS, help="measure one pruner in this process")
    arguments = parser.parse_args()
    if arguments.pruner:
        sys.stdout.write(json.dumps(measure(arguments.folder, arguments.pruner)))
        return
    write_model(arguments.folder / "model", 1, **SHAPE)
    write_model(arguments.folder / "model-small", 1, **SMALL)
    wrong = False
    for pruner in PRUNERS:
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--pruner", pruner]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        stated = sum(found["stated"].values())
        ratio = stated / found["peak"]
        print(
            f"{pruner}: {found['peak'] / 1e6:.0f} MB; plan states {stated / 1e6:.0f} MB ({ratio:.2f} times)"
        )
        wrong |= not 1 <= ratio <= TOLERANCE
    sys.exit(wrong)


def measure(folder: Path, pruner: str) -> dict[str, int | dict[str, int]]:
    """Return the peak above the start and what ``plan`` states, in bytes."""
    run_stages(ArtifactStore(str(folder / f"store-small-{pruner}")), str(folder / "model-small"), pruner)
    before = memory("VmRSS")
    sizes = run_stages(ArtifactStore(str(folder / f"store-{pruner}")), str(folder / "model"), pruner)
    states = sizes.hidden_states(1, None)
    return {"peak": memory("VmHWM") - before, "stated": sizes.memory("cpu")[0] | {"hidden states": states}}


def run_stages(store: ArtifactStore, model: str, pruner: str) -> SearchSizes:
    checkpoint = import_checkpoint(store, model)
    linears = linears_by_layer(checkpoint.index, SEQLEN)
    calibration, selection = (
        tokens(store, role, checkpoint.config.vocab_size) for role in ("calibration", "selection")
    )
    execution = Execution()
    search = Search(model="-", sparsity=SPARSITY, pruner=PRUNERS[pruner], seqlen=SEQLEN)
    settings = search.pruning("bfloat16")
    captured = capture.fn(store, checkpoint, calibration, selection, CaptureSettings("bfloat16"), execution)
    grams = capture_grams.fn(store, checkpoint, calibration, "bfloat16", execution)
    inputs = LaneInputs(checkpoint, captured, calibration, selection, grams)
    plans = [arithmetic(SPARSITY, 0.0, layer_sizes_of(linears))]
    (lane,) = branch.fn(store, inputs, plans, linears, settings, execution)
    export.fn(store, inputs, lane, lane, linears, settings, execution)
    windows: dict[Role, int] = {"calibration": WINDOWS, "selection": WINDOWS, "test": WINDOWS}
    return SearchSizes(search, checkpoint.index, linears, "bfloat16", len(plans), windows)


if __name__ == "__main__":
    main()
