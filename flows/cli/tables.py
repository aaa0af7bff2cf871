"""Results and plans as tables and sentences in the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from layerwise.display.byte_size import size
from layerwise.display.duration import duration
from layerwise.scoring.perplexity import format_perplexity
from layerwise.storage.artifact import Artifact
from layerwise.tasks.results.distillation import Distillation, distillation_rows
from layerwise.tasks.results.evaluation import RecoveryTest, TestResult
from layerwise.tasks.results.selection import Selection
from layerwise.tasks.results.summary import (
    recovery_rows,
    sentence_on_experts,
    sentence_on_stop,
    sentence_on_test,
    table_rows,
)

if TYPE_CHECKING:  # a command imports only the flow that it runs
    from layerwise.flows.pipeline.comparison_tables import Compared
    from layerwise.flows.pipeline.result import SearchResult
    from layerwise.flows.plan import Plan, PlannedStage
    from layerwise.flows.theory import TheoryResult
    from layerwise.sparse.speed import SpeedTable


def show_result(console: Console, result: "SearchResult") -> None:
    """Print the table of a search, its verdict, the test perplexities, the model's folder, and the work done."""
    from layerwise.flows.pipeline.result import loading_class, work_sentence

    title = f"{result.source} at sparsity {result.settings.sparsity:g}, {result.settings.pruner.method}"
    show_selection(console, title, result.selection)
    show_test(console, result.test)
    if result.recovery is not None:
        show_recovery(console, result.recovery, result.recovery_text)
    if result.experts:
        console.print(sentence_on_experts(result.experts), soft_wrap=True)
    show_stop(console, result.settings.stop_after, result.selection)
    if result.pruned is not None:
        console.print()
        console.print(f"Pruned model: {_short(result.pruned)}", soft_wrap=True)
    if result.pruned is not None and "://" not in result.pruned:  # transformers opens no URL
        console.print(
            f"  {loading_class(result)}.from_pretrained({_short(result.pruned)!r})",
            style="dim",
            soft_wrap=True,
        )
    console.print(f"Report: {_short(result.report)}", soft_wrap=True)
    console.print(work_sentence(result))


def show_selection(console: Console, title: str, selection: Selection) -> None:
    """Print one row per beta, with the best one highlighted."""
    # As a title of the table it would be wrapped to its width.
    console.print(title, style="italic", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = table_rows(selection)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "plan" else "right")
    for index, row in enumerate(rows):
        cells = [f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()]
        table.add_row(*cells, style="bold green" if index == selection.best else None)
    console.print(table)
    console.print()
    console.print(
        f"On the selection text (dense: {format_perplexity(selection.dense_perplexity)}): {selection.verdict}."
    )


def show_test(console: Console, test: TestResult) -> None:
    """Print the test perplexities side by side."""
    console.print(sentence_on_test(test))


def show_recovery(console: Console, recovery: RecoveryTest, text: str) -> None:
    """Print the perplexities with and without recovery on both texts, and what it was fitted on."""
    console.print()
    show_rows(console, recovery_rows(recovery), left=("model",))
    console.print(text, soft_wrap=True)


def show_stop(console: Console, stop_after: int | None, selection: Selection) -> None:
    """Print a note if the search was stopped early."""
    if sentence := sentence_on_stop(stop_after, len(selection.rows)):
        console.print(sentence)


def show_comparison(console: Console, results: "Sequence[Compared]") -> None:
    """Print one row per method with all seeds together; with a single seed, one row per search."""
    from layerwise.flows.pipeline.comparison_tables import rows_of, summary_of

    several = len({each.result.settings.seed for each in results}) > 1
    rows = summary_of(results) if several else rows_of(results)
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not several:
        names = [name for name in names if not name.startswith("selection") and name != "seed"]
    show_rows(
        console,
        [{name: row.get(name, "") for name in names} for row in rows],
        ("pruner", "recover", "allocator"),
    )
    if len({each.allocator for each in results}) > 1:
        for each in results:
            if each.allocator == results[0].allocator:
                search, seed = each.result.settings, f", seed {each.result.settings.seed}" if several else ""
                recovery = "" if search.recover is None else f", {search.recover.method}"
                what = f"{search.sparsity:g}, {search.pruner.method}{recovery}{seed}"
                console.print(
                    f"Report, all allocators at {what}: {_short(each.result.report)}", soft_wrap=True
                )


def show_rows(console: Console, rows: Sequence[Mapping[str, object]], left: Sequence[str]) -> None:
    """Print a table. Cells of columns that a row lacks are empty.

    Args:
        left: columns that are aligned to the left.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    console.print(table)


def show_compressed(console: Console, folder: Artifact, place: str) -> None:
    """Print the sizes of a checkpoint before and after compression, and the folder of the compressed one."""
    facts = {name: float(str(value)) for name, value in folder.facts.items()}
    for name, of_what in (("all tensors", ""), ("the pruned linears", " of linears")):
        before, after = (size(round(facts[f"{kind} bytes{of_what}"])) for kind in ("dense", "compressed"))
        console.print(f"{name}: {before} to {after} ({facts['ratio' + of_what]:.3f})")
    console.print(f"Compressed model: {_short(place)}", soft_wrap=True)


def show_distilled(console: Console, result: Distillation, place: str) -> None:
    """Print the perplexities of the dense, the pruned and the distilled model, and the folder of the last one."""
    show_rows(console, distillation_rows(result), left=("model",))
    console.print(result.sentence, soft_wrap=True)
    console.print(f"Distilled model: {_short(place)}", soft_wrap=True)


def show_speed(console: Console, table: "SpeedTable", report: str | None) -> None:
    """Print one row per way of running the model."""
    from layerwise.tasks.results.speed_table import speed_rows, speed_sentence

    show_rows(console, speed_rows(table), left=("way",))
    console.print(speed_sentence(table))
    if report is not None:
        console.print(f"Report: {_short(report)}", soft_wrap=True)


def show_plan(console: Console, plan: "Plan") -> None:
    """Print the stages that would run, those that the store has, and the time, memory and bytes that they need."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    table.add_column("state")
    table.add_column("weights read", justify="right")
    table.add_column("store grows by", justify="right")
    if plan.measuring is not None:
        table.add_column("time", justify="right")
    for stage in plan.stages:
        cells = [stage.name, stage.state, size(stage.reads), size(stage.writes)]
        if plan.measuring is not None:
            cells.append(_time_of(stage))
        table.add_row(*cells, style=None if stage.to_do else "dim")
    console.print(table)
    console.print()
    if plan.measuring is not None:
        unknown = [stage.name for stage in plan.stages if stage.to_do and stage.seconds is None]
        without = f" without {' and '.join(unknown)}" if unknown else ""
        taken = f"estimated from {duration(plan.measuring)} of measuring this machine ({plan.device})"
        console.print(f"time: about {duration(plan.seconds)}{without}, {taken}", soft_wrap=True)
    for note in plan.notes:
        console.print(f"  {note}", soft_wrap=True)
    betas = ", ".join(f"{beta:g}" for beta in plan.betas)
    console.print(f"betas: {betas} (0 is uniform)", soft_wrap=True)
    if plan.fan_out and plan.groups:
        groups = "1 group" if len(plan.groups) == 1 else f"{len(plan.groups)} groups"
        sizes = ", ".join(map(str, plan.groups))
        console.print(
            f"fan-out: {groups} of {sizes} betas on {plan.fan_out}; each group reads the model once. "
            "The following lines are for each process:",
            soft_wrap=True,
        )
    console.print(f"memory: about {_sum_of(plan.memory)}, in addition to Python's own", soft_wrap=True)
    if plan.device_memory:
        console.print(f"memory of {plan.device}: about {_sum_of(plan.device_memory)}", soft_wrap=True)
    if plan.scratch:
        console.print(f"scratch files: {size(plan.scratch)} of hidden states beyond the memory budget")
    by_layers = (
        f", by number of layers {size(plan.resume_bytes_a_stage)} per stage"
        if plan.resume_bytes_a_stage
        else ""
    )
    taking = "" if plan.resume_point_seconds is None else f" in {duration(plan.resume_point_seconds)}"
    console.print(
        f"a resume point of the largest stage: {size(plan.resume_point)}{taking}; each one replaces the one before. "
        f"Written by time: at most {size(round(plan.resume_bytes_an_hour))} per hour, in less than 5 % of the time{by_layers}"
    )


def _time_of(stage: "PlannedStage") -> str:
    if stage.seconds is None:
        return "unknown" if stage.to_do else ""
    return duration(stage.seconds) if stage.seconds else ""


def _sum_of(memory: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {size(count)}" for name, count in memory.items() if count)
    return f"{size(sum(memory.values()))} ({parts})"


def show_theory(console: Console, result: "TheoryResult") -> None:
    """Print one sentence per theorem, and the path of the page."""
    from layerwise.tasks.pages.theory_section import sentences

    console.print(f"{result.settings.title}: the theorems of ATP", style="bold")
    for name, sentence in sentences(result.findings).items():
        console.print(f"{name}  {sentence}", soft_wrap=True)
    console.print()
    console.print(f"Page: {_short(result.page)}", soft_wrap=True)


def _short(path: str) -> str:
    """Return a path below the working folder relative to it."""
    return path.removeprefix(f"{Path.cwd()}/")
