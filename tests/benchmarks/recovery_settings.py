"""Settings of the refit: test perplexity of SmolLM2-135M by alpha, steps and calibration tokens, and the CPU time of a lane.

    .venv/bin/python tests/benchmarks/recovery_settings.py --calibration c4.txt --test wiki.test.txt --store /tmp/recovery

Wanda at 70 %, windows of 512 tokens, 32 for the test. Every row is one lane on the test windows, so the figures compare
settings and choose nothing. Takes about two hours on two cores; ``--only cost`` takes ten minutes. Lanes in the store are
reused. Exits with 1 if the refit with the default settings leaves more than .55 of the perplexity of the uniform plan or of
the best beta without it, or takes more than six times the CPU time of a lane.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prefect import flow

from layerwise.flows.orchestration.embedded_server import ServerStart
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.graph import Captured, capture_steps
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import Search
from layerwise.recovery.layer_recovery import Recovery
from layerwise.recovery.refit import Refit
from layerwise.recovery.train import Train
from layerwise.scoring.perplexity import perplexity
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.branch import branch

SPARSITY = 0.7
BETAS = (0.0, 0.005, 0.01)
ALPHAS = (0.0, 0.1, 0.25, 0.5, 1.0)
STEPS = (2, 4, 8, 16, 32)
WINDOWS = (8, 16, 32, 64, 128)  # of 512 tokens: 4k to 64k
SEEDS = (0, 1, 2)


class Lanes:
    """Lanes of one sparsity that are scored on the test windows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.store = ArtifactStore(str(arguments.store))
        self.execution = Runtime(store=self.store.url).execution()
        self.common = Search(
            model="demo",
            sparsity=SPARSITY,
            betas=tuple(beta for beta in arguments.betas if beta),
            calibration=str(arguments.calibration),
            selection=str(arguments.test),
            test=str(arguments.test),
            calibration_windows=32,
            selection_windows=2,
            test_windows=32,
            seqlen=512,
            dtype="bfloat16",
        )

    def captured(self, **changes: object) -> Captured:
        """Capture the dense model for a seed and a number of windows."""
        settings = self.common.model_copy(update=changes)

        @flow(name="prepare recovery_settings")
        def prepare() -> Captured:
            steps = capture_steps(self.store, settings, check_inputs(self.store, settings))
            return build(steps, self.execution)[0]

        return prepare()

    def perplexities(
        self, captured: Captured, betas: Sequence[float], recovery: Recovery | None
    ) -> tuple[dict[float, float], float]:
        """Return the test perplexity by beta, and the CPU time of this process in seconds."""
        plans = [plan for plan in captured.plans if plan.beta in betas]
        pruning = replace(captured.pruning, recover=recovery)
        began = time.process_time()
        scores = branch.fn(
            self.store, captured.inputs("test"), plans, captured.linears, pruning, self.execution
        )
        return {score.plan.beta: perplexity(score.losses) for score in scores}, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--only", choices=("cost", "alpha", "steps", "windows", "train"))
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS, help="of the rows by alpha")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the rows by alpha")
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    arguments = parser.parse_args()
    ServerStart().wait()
    lanes, problems = Lanes(arguments), []
    parts = {"cost": cost, "alpha": by_alpha, "steps": by_steps, "windows": by_windows, "train": by_training}
    for name, part in parts.items():
        if arguments.only in (None, name):
            problems += part(lanes)
    print("\n".join(problems) or "all figures are in their ranges")
    sys.exit(bool(problems))


def show(what: str, found: dict[float, float], seconds: float) -> None:
    cells = ", ".join(f"beta {beta:g}: {value:.1f}" for beta, value in found.items())
    print(f"{what}: {cells} ({seconds:.0f} CPU s)", flush=True)


def cost(lanes: Lanes) -> list[str]:
    """Compare the default refit with plain pruning: perplexity, and CPU time of one more lane."""
    captured = lanes.captured(seed=os.getpid())  # a seed without lanes in the store, so that all are computed
    one, seconds_of_one = lanes.perplexities(captured, BETAS[:1], None)
    two, seconds_of_two = lanes.perplexities(captured, BETAS[1:], None)
    lane = seconds_of_two - seconds_of_one
    recovered, seconds = lanes.perplexities(captured, BETAS[:1], Refit())
    refit = seconds - (seconds_of_one - lane)  # without the dense lane
    show("not recovered", one | two, seconds_of_one + seconds_of_two)
    show("refit", recovered, seconds)
    print(
        f"one lane {lane:.0f} CPU s; with refit {refit:.0f} CPU s, {refit / lane:.1f} times as much (at most 6)"
    )
    return [] if refit <= 6 * lane else ["OFF the refit takes more than six lanes"]


def by_alpha(lanes: Lanes) -> list[str]:
    """Show alpha by beta and seed."""
    problems = []
    betas = lanes.arguments.betas
    for seed in lanes.arguments.seeds:
        captured = lanes.captured(seed=seed)
        plain, seconds = lanes.perplexities(captured, betas, None)
        show(f"seed {seed}, not recovered", plain, seconds)
        for alpha in lanes.arguments.alphas:
            found, seconds = lanes.perplexities(captured, betas, Refit(alpha=alpha))
            show(f"seed {seed}, alpha {alpha:g}", found, seconds)
            if alpha == Refit().alpha and 0.0 in plain:
                shares = found[0.0] / plain[0.0], min(found.values()) / min(plain.values())
                print(
                    f"seed {seed}: uniform {shares[0]:.2f}, best {shares[1]:.2f} of the perplexity without it"
                )
                problems += [f"OFF seed {seed}: {share:.2f} is above .55" for share in shares if share > 0.55]
    return problems


def by_steps(lanes: Lanes) -> list[str]:
    """Show the number of conjugate-gradient steps, and the damping."""
    captured = lanes.captured()
    for steps in STEPS:
        show(f"{steps} steps", *lanes.perplexities(captured, BETAS[1:2], Refit(steps=steps)))
    for damping in (0.001, 0.01, 0.1):
        show(f"damping {damping:g}", *lanes.perplexities(captured, BETAS[1:2], Refit(damping=damping)))
    return []


def by_windows(lanes: Lanes) -> list[str]:
    """Show the number of calibration tokens."""
    for windows in lanes.arguments.windows:
        captured = lanes.captured(calibration_windows=windows)
        plain, seconds = lanes.perplexities(captured, BETAS[1:], None)
        show(f"{512 * windows:,} tokens, not recovered", plain, seconds)
        refit, seconds = lanes.perplexities(captured, BETAS[1:2], Refit())
        show(f"{512 * windows:,} tokens, refit", refit, seconds)
        print(
            f"{min(refit.values()) / min(plain.values()):.2f} of the best perplexity without it", flush=True
        )
    return []


def by_training(lanes: Lanes) -> list[str]:
    """Show the training after the refit."""
    captured = lanes.captured()
    show("train", *lanes.perplexities(captured, BETAS[1:2], Train()))
    return []


if __name__ == "__main__":
    main()
