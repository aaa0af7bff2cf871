"""Cost of another beta: nine lanes together against one, on SmolLM2-135M, with the weights read once.

    .venv/bin/python tests/benchmarks/marginal_lane.py --store .layerwise

Interleaved runs in one process, each on fresh keys (another overall sparsity); exits with 1 if nine lanes take
more than six times the time of one, or read a layer's weights more than once.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

from prefect import flow

from layerwise.allocators.atp import arithmetic
from layerwise.flows.orchestration.embedded_server import ServerStart
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.graph import Captured, capture_steps
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import Search
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.branch import branch
from layerwise.tasks.models.streamed import layer_sizes_of

ROUNDS = 3
BETAS = tuple(0.001 * index for index in range(9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    store = ArtifactStore(str(parser.parse_args().store))
    settings = Search(
        model="demo", sparsity=0.5, seqlen=512, calibration_windows=8, selection_windows=8, test_windows=8
    )
    execution = Runtime(store=store.url).execution()
    ServerStart().wait()

    @flow(name="prepare marginal_lane")
    def prepare() -> Captured:
        return build(capture_steps(store, settings, check_inputs(store, settings)), execution)[0]

    captured = prepare()
    checkpoint, linears, lane_inputs = captured.checkpoint, captured.linears, captured.inputs("selection")
    layers = sum(checkpoint.index.layer_bytes)
    ratios = []
    salt = time.time() % 1e-3  # another target every time, so that no lane is in the store already
    for index in range(ROUNDS):
        seconds = {}
        for count in (1, len(BETAS)):
            target = 0.5 + salt + 1e-4 * index + 1e-5 * count
            plans = [arithmetic(target, beta, layer_sizes_of(linears)) for beta in BETAS[:count]]
            pruning = settings.model_copy(update={"sparsity": target}).pruning("bfloat16")
            read, began = checkpoint.bytes_read, time.monotonic()
            branch.fn(store, lane_inputs, plans, linears, pruning, execution)
            seconds[count] = time.monotonic() - began
            read = checkpoint.bytes_read - read
            print(
                f"{count} lanes: {seconds[count]:.1f} s, {read / 1e6:.0f} MB read (decoder layers: {layers / 1e6:.0f})"
            )
            if read >= 2 * layers:
                sys.exit("the weights were read more than once")
        ratios.append(seconds[len(BETAS)] / seconds[1])
    print(f"nine lanes take {statistics.median(ratios):.2f} times the time of one (at most 6)")
    sys.exit(statistics.median(ratios) > 6)


if __name__ == "__main__":
    main()
