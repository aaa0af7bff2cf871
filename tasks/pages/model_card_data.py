"""The content of a model card, read from the artifacts of a search."""

import math
from collections.abc import Mapping, Sequence

from layerwise.scoring.perplexity import mean_loss, perplexity
from layerwise.storage.artifact import Artifact
from layerwise.tasks.lanes.lane_group import LaneInputs
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.pages.model_card import ModelCard, Result, ResultByKL
from layerwise.tasks.results.distillation import Distillation
from layerwise.tasks.results.evaluation import TestResult
from layerwise.tasks.results.lane_scores import LaneScore
from layerwise.tasks.results.selection import dense_perplexity
from layerwise.tasks.sources.model_source import HUB_ID, DemoSource
from layerwise.tasks.sources.source_license import License
from layerwise.tasks.texts.token_windows import shape_of


def card_of_lane(
    inputs: LaneInputs,
    chosen: LaneScore,
    uniform: LaneScore,
    settings: PruneSettings,
    rows: Sequence[Mapping[str, int]],
) -> ModelCard:
    """Make the card of the chosen lane, with the results on the selection text.

    With recovery, the lanes may have been recovered on fewer windows than the model, so the card has no results on the
    selection text; its section on recovery has those on the test text. The card does not name the allocator, because a lane does not depend on how its plan was made.

    Args:
        inputs: inputs of the lanes.
        rows: zeros and weights of every pruned linear: the ``linears`` of ``sparsity.json``.
    """
    checkpoint, perplexities = inputs.checkpoint, (perplexity(uniform.losses), perplexity(chosen.losses))
    divergences = None
    if uniform.divergences is not None and chosen.divergences is not None:
        divergences = mean_loss(uniform.divergences), mean_loss(chosen.divergences)
    return ModelCard(
        source_name(checkpoint),
        source_license(checkpoint),
        settings.pruner.method,
        settings.pattern,
        None,
        tuple(
            _realised([row for row in rows if row["layer"] == index])
            for index in range(checkpoint.num_layers)
        ),
        _realised(rows),
        _results(
            "selection text", inputs.scored, dense_perplexity(inputs.capture), *perplexities, divergences
        )
        if settings.recover is None
        else (),
    )


def results_on_test(test: TestResult, windows: Artifact) -> tuple[Result, ...]:
    """Return the rows of the test for a card that is written after it. The export comes before the test.

    Args:
        windows: test windows.
    """
    divergences = None if test.kl is None else (test.kl.uniform, test.kl.best)
    return _results("test text", windows, test.dense, test.uniform, test.best, divergences)


def results_of_distillation(result: Distillation) -> tuple[Result, ...]:
    """Return the rows of a distilled model's card: its perplexities next to those of the dense and the pruned model."""
    names = {"dense": "dense", "pruned": "pruned, before the distillation", "distilled": "**this model**"}
    held_out = [row.held_out for row in result.rows]
    texts = [
        ("test text", result.test_windows, [row.test for row in result.rows]),
        ("calibration text, held-out windows", result.held_out_windows, held_out),
    ]
    return tuple(
        Result(names[row.model], text, windows, result.seqlen, value)
        for text, windows, values in texts
        for row, value in zip(result.rows, values, strict=True)
    )


def source_name(checkpoint: Checkpoint) -> str:
    """Return the name of the dense model for the card: its hub id, or the last part of its path."""
    source = str(checkpoint.artifact.facts["source"])
    if source == DemoSource.label:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    on_the_hub = HUB_ID.fullmatch(source) is not None
    return source if on_the_hub else source.rstrip("/").rpartition("/")[2]


def source_license(checkpoint: Checkpoint) -> License | None:
    """Return the licence of the dense model; None if its files state none, or an earlier version imported it."""
    facts = checkpoint.artifact.facts.get("license")
    return License(**facts) if isinstance(facts, dict) else None


def _realised(rows: Sequence[Mapping[str, int]]) -> float:
    return math.fsum(row["zeros"] for row in rows) / sum(row["weights"] for row in rows)


def _results(
    text: str,
    windows: Artifact,
    dense: float,
    uniform: float,
    best: float,
    divergences: tuple[float, float] | None,
) -> tuple[Result, ...]:
    """Return the rows of one text, given perplexities, and the divergences of the uniform and the best plan, if any."""
    count, seqlen = shape_of(windows)
    models = {"dense": dense, "uniform": uniform, "**this model**": best}
    if divergences is None:
        return tuple(Result(model, text, count, seqlen, value) for model, value in models.items())
    return tuple(
        ResultByKL(model, text, count, seqlen, value, kl)
        for (model, value), kl in zip(models.items(), (0.0, *divergences), strict=True)
    )
