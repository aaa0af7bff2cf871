"""Compare two pruners with and without recovery, and print one line per search.

    .venv/bin/python examples/compare.py

Takes about an hour on two cores with the demo model. Start it again after an interruption: it continues.
"""

from collections.abc import Sequence

from layerwise import Search
from layerwise.flows.compare import Compare, compare
from layerwise.flows.orchestration.embedded_server import ServerStart
from layerwise.flows.runtime import FanOutRuntime
from layerwise.scoring.perplexity import format_perplexity


def main(common: Search, runtime: FanOutRuntime, pruners: Sequence[str] = ("wanda", "sparsegpt")) -> None:
    """Run the searches. Those with the same seed share the pass of the dense model."""
    settings = Compare.model_validate({"search": common, "pruners": pruners, "recoveries": ["none", "refit"]})
    for each in compare(settings, runtime):
        search, test = each.result.settings, each.result.test
        recovery = "one-shot" if search.recover is None else search.recover.method
        dense, uniform, best = map(format_perplexity, (test.dense, test.uniform, test.best))
        print(f"{search.pruner.method}, {recovery}: dense {dense}, uniform {uniform}, best {best}")


if __name__ == "__main__":
    ServerStart().wait()
    demo = Search(
        model="demo", sparsity=0.6, seqlen=512, calibration_windows=16, selection_windows=8, test_windows=12
    )
    main(demo, FanOutRuntime(store="runs"))
