"""CPU time of a search, compared with a plain loop over the betas: SmolLM2-135M, Wanda, bf16, windows of 512 tokens.

    .venv/bin/python tests/benchmarks/search_ratio.py --calibration c4.txt --selection wiki.valid.txt --store /tmp/ratio

The loop does what a script of the paper's kind does, one beta after the other: load the model, calibrate every layer on the
pruned model, prune it, and measure the perplexity, on 32 calibration and 32 selection windows. The strategies run in
stores of their own, from the import up to the scores of their lanes. All in one process; the ratios are of CPU time.

``--replay`` runs the grid alone, and shows what ``auto`` chooses from the grid's losses: it scores the same lanes on the same
windows, so its choice needs no run of its own; with ``--orders``, also from random orders of the windows. ``--times`` runs ``auto`` and the loop, without the grid.

Exits with 1 if ``auto`` takes more than 1 / 5.5 of the loop's time, or chooses a beta more than one step of .002 from the
grid's best, or one with a perplexity outside of the grid's standard error.
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from prefect import flow
from transformers import PreTrainedModel

from layerwise.allocators.atp import arithmetic
from layerwise.allocators.beta_grid import BETA_STEP, beta_grid
from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.flows.orchestration.embedded_server import ServerStart
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.graph import Scored, scoring_steps
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.pipeline.search_strategy import SearchStrategy, strategy_of
from layerwise.flows.runtime import Runtime
from layerwise.flows.setting_types import StrategyName
from layerwise.flows.settings import Search
from layerwise.scoring.perplexity import paired_difference
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.models.streamed import layer_sizes_of
from layerwise.tasks.models.whole_model import whole_model
from layerwise.tasks.texts.token_windows import read_input_ids

GOAL = 5.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--selection", required=True)
    parser.add_argument("--store", type=Path, required=True, help="a new folder")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--strategies", nargs="*", default=[], help="in addition to grid and auto")
    parser.add_argument(
        "--loop-betas", type=int, help="betas of the loop that are run; the time is scaled to all"
    )
    parser.add_argument("--replay", action="store_true", help="run the grid only")
    parser.add_argument("--orders", type=int, default=0, help="of the windows, for more choices by --replay")
    parser.add_argument("--times", action="store_true", help="run auto and the loop only, for the ratio")
    arguments = parser.parse_args()
    ServerStart().wait()
    problems = []
    for sparsity in arguments.sparsities:
        for seed in arguments.seeds:
            measure = replay if arguments.replay else times if arguments.times else compare
            problems += measure(arguments, sparsity, seed)
    print("\n".join(problems) or "all figures are in their ranges")
    sys.exit(bool(problems))


def settings_of(arguments: argparse.Namespace, strategy: StrategyName, sparsity: float, seed: int) -> Search:
    return Search(
        model="demo",
        sparsity=sparsity,
        seed=seed,
        strategy=strategy,
        calibration=arguments.calibration,
        selection=arguments.selection,
        calibration_windows=32,
        selection_windows=32,
        test_windows=2,
        seqlen=512,
        dtype="bfloat16",
    )


def replay(arguments: argparse.Namespace, sparsity: float, seed: int) -> list[str]:
    """Run the grid, and show the choice and the lanes of ``auto`` on its losses."""
    store = ArtifactStore(
        str(arguments.store / "replay")
    )  # one for all: searches with one seed share their capture
    grid = search(store, settings_of(arguments, "grid", sparsity, seed))
    losses = {score.plan: score.losses for score in grid.scores}
    strategy = strategy_of(
        settings_of(arguments, "auto", sparsity, seed), tuple(losses), grid.captured.linears, 32
    )
    best = grid.best.plan
    chosen, known, windows = choice_of(strategy, losses)
    difference = paired_difference(losses[chosen], losses[best])
    print(
        f"S={sparsity:g}, seed {seed}: grid beta {best.beta:g}, perplexity {perplexity_of(losses[best]):.2f}; auto beta "
        f"{chosen.beta:g}, {perplexity_of(losses[chosen]):.2f}, t {difference.t or 0:.1f}, {len(known)} lanes, {windows} "
        "passes of a window",
        flush=True,
    )
    far, worse, total = 0, 0, 0
    for number in range(arguments.orders):
        order = torch.randperm(32, generator=torch.Generator().manual_seed(number)).tolist()
        shuffled = {plan: tuple(each[window] for window in order) for plan, each in losses.items()}
        found, _, passes = choice_of(strategy, shuffled)
        far += abs(found.beta - best.beta) > 1.01 * BETA_STEP
        worse += (paired_difference(losses[found], losses[best]).t or 0) > 1
        total += passes
    if arguments.orders:
        print(
            f"S={sparsity:g}, seed {seed}, {arguments.orders} random orders of the windows: {far} choices more than a step "
            f"from the grid's, {worse} worse with t above 1; {total / arguments.orders:.0f} passes of a window on average",
            flush=True,
        )
    within = difference.t is None or difference.t <= 1
    if within and abs(chosen.beta - best.beta) <= 1.01 * BETA_STEP:
        return []
    return [f"OFF S={sparsity:g}, seed {seed}: auto chose {chosen.beta:g}, the grid {best.beta:g}"]


def choice_of(
    strategy: SearchStrategy, losses: Mapping[SparsityPlan, tuple[float, ...]]
) -> tuple[SparsityPlan, Mapping[SparsityPlan, tuple[float, ...]], int]:
    """Return the plan that a strategy chooses, the losses that it asks for, and their number."""
    known: dict[SparsityPlan, tuple[float, ...]] = {}
    windows = 0
    while request := strategy.next_lanes(known):
        first, end = request.windows or (0, 32)
        known |= {plan: losses[plan][:end] for plan in request.plans if len(known.get(plan, ())) < end}
        windows += len(request.plans) * (end - first)
    complete = [plan for plan in known if len(known[plan]) == 32]
    return min(complete, key=lambda plan: perplexity_of(known[plan])), known, windows


def compare(arguments: argparse.Namespace, sparsity: float, seed: int) -> list[str]:
    """Run the loop and the strategies for one sparsity and seed, and print a row for each."""
    seconds, scored = {}, {}
    for strategy in dict.fromkeys(("grid", *arguments.strategies, "auto")):
        folder = arguments.store / f"{strategy}-{sparsity}-{seed}"
        settings = settings_of(arguments, strategy, sparsity, seed)
        began = time.process_time()
        scored[strategy] = search(ArtifactStore(str(folder)), settings)
        seconds[strategy] = time.process_time() - began
    seconds["loop"], betas = timed_loop(arguments, f"grid-{sparsity}-{seed}", scored["grid"], sparsity)
    losses = {score.plan.beta: score.losses for score in scored["grid"].scores}
    best = scored["grid"].best.plan.beta
    problems = []
    for name, found in scored.items():
        beta = found.best.plan.beta
        row = f"S={sparsity:g}, seed {seed}, {name}: {seconds[name]:.0f} CPU s, {seconds['loop'] / seconds[name]:.1f} times"
        print(
            f"{row} faster than the loop, beta {beta:g}, perplexity {perplexity_of(losses[beta]):.1f}",
            flush=True,
        )
        difference = paired_difference(losses[beta], losses[best])
        within = difference.t is None or difference.t <= 1
        if name == "auto" and not (within and abs(beta - best) <= 1.01 * BETA_STEP):
            problems.append(f"OFF S={sparsity:g}, seed {seed}: auto chose {beta:g}, the grid {best:g}")
    print(f"S={sparsity:g}, seed {seed}, loop over {betas} betas: {seconds['loop']:.0f} CPU s", flush=True)
    if seconds["loop"] < GOAL * seconds["auto"]:
        problems.append(f"OFF S={sparsity:g}, seed {seed}: auto is less than {GOAL:g} times faster")
    return problems


def times(arguments: argparse.Namespace, sparsity: float, seed: int) -> list[str]:
    """Run ``auto`` and the loop, and print their times."""
    folder = f"auto-{sparsity}-{seed}"
    began = time.process_time()
    scored = search(
        ArtifactStore(str(arguments.store / folder)), settings_of(arguments, "auto", sparsity, seed)
    )
    seconds = time.process_time() - began
    of_loop, betas = timed_loop(arguments, folder, scored, sparsity)
    row = f"S={sparsity:g}, seed {seed}, auto: {seconds:.0f} CPU s; loop over {betas} betas: {of_loop:.0f} CPU s"
    print(f"{row}; {of_loop / seconds:.2f} times faster", flush=True)
    return [] if of_loop >= GOAL * seconds else [f"OFF {row}: less than {GOAL:g} times faster"]


def timed_loop(
    arguments: argparse.Namespace, folder: str, scored: Scored, sparsity: float
) -> tuple[float, int]:
    """Return the CPU time of the loop, scaled to all betas if ``--loop-betas`` runs fewer, and the number of all betas."""
    betas = beta_grid(sparsity, layer_sizes_of(scored.captured.linears))
    count = arguments.loop_betas or len(betas)
    began = time.process_time()
    loop(ArtifactStore(str(arguments.store / folder)), scored, sparsity, betas[:count])
    return (time.process_time() - began) * len(betas) / count, len(betas)


def search(store: ArtifactStore, settings: Search) -> Scored:
    """Run a search up to the scores of its lanes."""

    @flow(name="search_ratio")
    def run() -> Scored:
        return build(
            scoring_steps(store, settings, check_inputs(store, settings)),
            Runtime(store=store.url).execution(),
        )[0]

    return run()


def perplexity_of(losses: tuple[float, ...]) -> float:
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def loop(store: ArtifactStore, scored: Scored, sparsity: float, betas: tuple[float, ...]) -> None:
    """Prune and score a model in memory, one beta after the other."""
    captured = scored.captured
    execution = Runtime(store=store.url).execution()
    calibration, selection = (
        read_input_ids(store, captured.windows[role]) for role in ("calibration", "selection")
    )
    for beta in betas:
        model = whole_model(captured.checkpoint, "bfloat16", execution)
        plan = arithmetic(sparsity, beta, layer_sizes_of(captured.linears))
        prune_model(model, calibration, sparsities_by_layer(plan))
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in selection]
        print(f"loop, beta {beta:g}: perplexity {perplexity_of(tuple(losses)):.1f}", flush=True)


def sparsities_by_layer(plan: SparsityPlan) -> tuple[float, ...]:
    """Return one sparsity for each layer, as a plan by ATP has it."""
    sparsities = [sparsity for sparsity in plan.layers if isinstance(sparsity, float)]
    assert len(sparsities) == len(plan.layers), "a plan by ATP"
    return tuple(sparsities)


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    layers = model.base_model.layers
    assert isinstance(layers, torch.nn.ModuleList), "the demo model has decoder layers"
    return layers


def prune_model(model: PreTrainedModel, calibration: torch.Tensor, sparsities: tuple[float, ...]) -> None:
    """Prune layer after layer by Wanda, each calibrated on the outputs of the pruned layers before it."""
    states, arguments = first_inputs(model, calibration)
    for layer, sparsity in zip(layers_of(model), sparsities, strict=True):
        linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        squares = {linear: torch.zeros(linear.in_features) for linear in linears}

        def observe(linear: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
            squares[linear] += inputs[0].reshape(-1, inputs[0].shape[-1]).float().square().sum(dim=0)  # noqa: B023

        hooks = [linear.register_forward_pre_hook(observe) for linear in linears]
        for window in states:
            layer(window, **arguments)
        for hook in hooks:
            hook.remove()
        for linear in linears:
            scores = linear.weight.abs().float() * squares[linear].sqrt()
            removed = scores.argsort(dim=1, stable=True)[:, : round(sparsity * linear.in_features)]
            linear.weight.scatter_(1, removed, 0)
        for number, window in enumerate(states):
            output = layer(window, **arguments)
            states[number] = output if isinstance(output, torch.Tensor) else output[0]


def first_inputs(
    model: PreTrainedModel, calibration: torch.Tensor
) -> tuple[list[torch.Tensor], dict[str, object]]:
    """Return the first layer's input of every window, and the other arguments of a layer."""
    states: list[torch.Tensor] = []
    others: dict[str, object] = {}

    class Caught(Exception):
        pass

    def catch(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, object]) -> None:
        states.append(inputs[0])
        others.update(named)
        raise Caught

    hook = layers_of(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in calibration:
        with suppress(Caught):
            model(input_ids=window[None], use_cache=False)
    hook.remove()
    return states, others


if __name__ == "__main__":
    main()
