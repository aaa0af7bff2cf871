"""Tables of a comparison of searches: one row per search, and one row per method over all seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any

from layerwise.flows.pipeline.result import SearchResult
from layerwise.flows.presets.atp_paper import ZERO_SHOT, differences_from_published, find_published
from layerwise.scoring.criterion import KL
from layerwise.scoring.perplexity import (
    DIVERGED,
    format_divergence,
    has_diverged,
    paired_difference,
    rounded_perplexity,
)
from layerwise.tasks.lm_eval_tasks.comparison import ZeroShotRow
from layerwise.tasks.pages.markdown import plain

Row = dict[str, str | float]


@dataclass(frozen=True)
class Compared:
    """One search of a comparison.

    Attributes:
        allocator: name of its way of allocating.
        losses: losses of the chosen plan on the test windows, in nats.
        seconds: time of this run. Time spent for several searches at once is shared out by their numbers of plans;
            artifacts that were in the store before cost nothing.
        accuracy: average over the tasks of lm-eval; None without tasks.
        tasks: names of these tasks.
        preset: name of the preset whose published numbers are shown; None without one.
    """

    result: SearchResult
    allocator: str
    losses: tuple[float, ...]
    seconds: float
    accuracy: ZeroShotRow | None = None
    tasks: tuple[str, ...] = ()
    preset: str | None = None

    @property
    def cell(self) -> tuple[float, str, str, int]:
        """Sparsity, pruner, recovery and seed of the search."""
        settings = self.result.settings
        recovery = recovery_title(settings.recover)
        return settings.sparsity, pruner_title(settings.pruner), recovery, settings.seed


def pruner_title(pruner: Any) -> str:
    """Return the method of a pruner (a dataclass), and its settings that are not the defaults."""
    return _method_title(pruner)


def recovery_title(recovery: Any) -> str:
    """Return the method of a recovery, and its settings that are not the defaults; "none" without recovery."""
    return "none" if recovery is None else _method_title(recovery)


def _method_title(method: Any) -> str:
    changed = [
        f"{field.name} {getattr(method, field.name)}"
        for field in fields(method)
        if field.name != "method" and getattr(method, field.name) != field.default
    ]
    return f"{method.method} ({', '.join(changed)})" if changed else str(method.method)


def rows_of(searches: Sequence[Compared]) -> list[Row]:
    """Return one row per search, in their order; the first allocator is the reference of the others."""
    references = {each.cell: each for each in reversed(searches) if each.allocator == searches[0].allocator}
    several = len({each.allocator for each in searches}) > 1
    recovers = any(each.result.settings.recover is not None for each in searches)
    rows = []
    for each in searches:
        result, selection, test = each.result, each.result.selection, each.result.test
        row: Row = {
            "sparsity": result.settings.sparsity,
            "pruner": pruner_title(result.settings.pruner),
            **({"recover": recovery_title(result.settings.recover)} if recovers else {}),
            "seed": result.settings.seed,
            "allocator": each.allocator,
            "best": selection.name(selection.best).removeprefix(f"{selection.parameter} "),
            "trials": len(selection.rows),
            "seconds": round(each.seconds),
            "selection: dense": rounded_perplexity(selection.dense_perplexity),
            "selection: uniform": rounded_perplexity(selection.rows[0].perplexity),
            "selection: best": rounded_perplexity(selection.best_row.perplexity),
            "test: dense": rounded_perplexity(test.dense),
            "test: uniform": rounded_perplexity(test.uniform),
            "test: best": rounded_perplexity(test.best),
            **_divergences(result),
            "times dense": round(test.best / test.dense, 3) if not has_diverged(test.best) else "",
            "gain %": round(100 * (1 - test.best / test.uniform), 1),
            "t": "" if test.gain is None or test.gain.t is None else f"{test.gain.t:.1f}",
        }
        row |= _accuracies(each) | _published(each)
        if several:
            reference = references[each.cell]
            row |= {} if each is reference else _above([each], [reference])
        rows.append(row)
    return rows


def summary_of(searches: Sequence[Compared]) -> list[Row]:
    """Return one row per sparsity, pruner, recovery and allocator: test perplexity over all seeds, compared with the reference.

    The test windows are the same for all seeds. The paired comparison therefore averages the losses of each window
    over the seeds: more seeds make the difference of a window more precise, but do not add windows.
    """
    groups: dict[tuple[float, str, str, str], list[Compared]] = {}
    for each in searches:
        groups.setdefault((*each.cell[:3], each.allocator), []).append(each)
    recovers = any(each.result.settings.recover is not None for each in searches)
    rows = []
    for (sparsity, pruner, recovery, allocator), members in groups.items():
        reference = groups[sparsity, pruner, recovery, searches[0].allocator]
        uniform, best = (
            [getattr(each.result.test, name) for each in members] for name in ("uniform", "best")
        )
        row: Row = {
            "sparsity": sparsity,
            "pruner": pruner,
            **({"recover": recovery} if recovers else {}),
            "allocator": allocator,
            "seeds": len(members),
            "uniform": _mean(uniform),
            "test": _mean(best),
            "spread": _spread(best),
            "gain %": round(100 * (1 - math.exp(fmean(map(_gain, members)))), 1),
        }
        if divergences := [each.result.test.kl.best for each in members if each.result.test.kl is not None]:
            row[f"{KL}, test"] = format_divergence(fmean(divergences))
        if allocator != searches[0].allocator:
            row |= _above(members, reference)
        rows.append(row)
    return rows


def markdown_of(rows: Sequence[Mapping[str, str | float]]) -> str:
    """Return a Markdown table with escaped cells. A column that a row does not have is empty in that row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(map(plain, names)) + " |", "|" + "--:|" * len(names)]
    lines += ["| " + " | ".join(plain(str(row.get(name, ""))) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _divergences(result: SearchResult) -> Row:
    """Return the divergences from the dense model; nothing if the criterion is perplexity."""
    selection, test = result.selection, result.test.kl
    uniform, best = selection.rows[0].kl, selection.best_row.kl
    if uniform is None or best is None or test is None:
        return {}
    return {
        f"selection: {KL}, uniform": format_divergence(uniform),
        f"selection: {KL}, best": format_divergence(best),
        f"test: {KL}, uniform": format_divergence(test.uniform),
        f"test: {KL}, best": format_divergence(test.best),
    }


def _accuracies(each: Compared) -> Row:
    """Return the accuracies of the models on the tasks, in per cent; empty without tasks."""
    if each.accuracy is None:
        return {}
    best = each.accuracy.best
    models = {"dense": each.accuracy.dense, "uniform": each.accuracy.uniform or best, "best": best}
    return {f"accuracy %: {name}": round(100 * model.value, 2) for name, model in models.items()}


def _published(each: Compared) -> Row:
    """Return the numbers that a paper has for this search; empty cells where none is known. Nothing without a preset.

    The paper tests the plan of each allocator, where this search may choose uniform. So the perplexity of its best plan
    other than uniform, on the selection windows, is shown as well.
    Accuracies are published as the average over ``ZERO_SHOT``, and are left out beside other tasks.
    """
    if each.preset is None:
        return {}
    settings = each.result.settings
    what = settings.model, settings.sparsity, settings.pruner.method
    found = {"uniform": find_published(*what, "uniform"), "best": find_published(*what, each.allocator)}
    others = [rated.perplexity for rated in each.result.selection.rows[1:]]  # without uniform
    row: Row = {"not uniform, on selection": rounded_perplexity(min(others)) if others else ""}
    row |= {f"published: {name}": "" for name in found}
    row |= {f"published: {name}": number.perplexity or "" for name, number in found.items() if number}
    if each.accuracy is not None and set(each.tasks) == set(ZERO_SHOT.split(",")):
        row |= {f"published %: {name}": (number and number.accuracy) or "" for name, number in found.items()}
    sources = "; ".join(dict.fromkeys(number.source for number in found.values() if number))
    other = differences_from_published(dict(settings))
    row["published in"] = (
        f"{sources} (there with another {', '.join(other)})" if sources and other else sources
    )
    return row


def _gain(each: Compared) -> float:
    """Return the difference of the mean losses, chosen plan minus uniform, in nats; negative if the plan is better."""
    return math.log(each.result.test.best / each.result.test.uniform)


def _above(members: Sequence[Compared], reference: Sequence[Compared]) -> Row:
    """Return the increase of the test perplexity over the reference, in percent, and its significance."""
    difference = paired_difference(_by_window(members), _by_window(reference))
    return {
        f"above {reference[0].allocator} %": round(100 * math.expm1(min(difference.mean, DIVERGED)), 1),
        "t of that": "" if difference.t is None else f"{difference.t:.1f}",
        "significant": "yes" if difference.significant else "no",
    }


def _by_window(members: Iterable[Compared]) -> list[float]:
    """Return the loss of each test window, averaged over the members."""
    return [fmean(losses) for losses in zip(*(each.losses for each in members), strict=True)]


def _mean(perplexities: Sequence[float]) -> str | float:
    return rounded_perplexity(math.exp(fmean(map(math.log, perplexities))))


def _spread(perplexities: Sequence[float]) -> str | float:
    """Return the standard deviation of the log perplexities over the seeds, in percent."""
    return round(100 * stdev(map(math.log, perplexities)), 1) if len(perplexities) > 1 else ""
