"""Prefect's share of a search: the time of the flow minus the time inside the functions of its tasks.

    .venv/bin/python tests/benchmarks/prefect_share.py --store /tmp/prefect_share

Runs the demo with an empty store. Exits with 1 if the share is above 5 %. The start of the embedded server is shown
separately.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from layerwise.flows.orchestration.embedded_server import ServerStart
from layerwise.flows.pipeline import graph
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from tests.demo_search import DEMO

TASKS = (
    check_inputs,
    graph.load_checkpoint,
    graph.sample_windows,
    graph.allocate,
    graph.capture,
    graph.branch,
    graph.select,
    graph.export,
    graph.evaluate,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    store = parser.parse_args().store
    if store.exists():
        sys.exit(f"{store} exists, but the search must compute everything. Give a new folder.")
    server = ServerStart()
    server.wait()
    inside: list[float] = []
    for task in TASKS:
        task.fn = timed(task.fn, inside)
    settings = Search.model_validate(DEMO)
    began = time.monotonic()
    search(settings, SearchRuntime(store=str(store)))
    total = time.monotonic() - began
    share = 1 - sum(inside) / total
    print(
        f"{total:.1f} s, of which {sum(inside):.1f} s in tasks; Prefect's share is {100 * share:.1f} % (at most 5)"
    )
    print(f"the start of the embedded server took another {server.seconds:.1f} s")
    sys.exit(share > 0.05)


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timing(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.monotonic() - began)

    return timing


if __name__ == "__main__":
    main()
