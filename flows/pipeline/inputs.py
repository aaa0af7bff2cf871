"""Inputs of a search: the model and the texts, checked before the model is imported."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from layerwise.allocators.sparsity_plan import SparsityPlan, units_of
from layerwise.flows.pipeline.search_strategy import first_lanes
from layerwise.flows.pipeline.size_estimate import SearchSizes
from layerwise.flows.pipeline.text_windows import Texts, count_texts, open_corpora
from layerwise.flows.settings import Search
from layerwise.models.expert_names import expert_linear
from layerwise.models.experts import experts_of_unknown_tokens
from layerwise.models.skeleton import Linear
from layerwise.recovery.pruned_layer import held_out_windows
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import import_checkpoint, import_stage, inspect_source
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.checkpoint_index import CheckpointIndex
from layerwise.tasks.models.streamed import linears_by_layer
from layerwise.tasks.models.tokenizer import tokenizer_of_source
from layerwise.tasks.results.run_names import title_of
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sources.model_config import config_from_document, outline_from_document

NAMED_LINEARS = 8  # linears listed in an error message, about those of one layer


@dataclass(frozen=True)
class SearchInputs:
    """The model and the texts of a search, known before any computation.

    Attributes:
        import_stage: stage that imports the model.
        checkpoint: the model; None if it is not imported yet.
        index: configuration of the model and shapes of its tensors.
        linears: linears of the decoder layers, by layer.
        texts: token counts and windows of the texts.
    """

    import_stage: Stage
    checkpoint: Checkpoint | None
    index: CheckpointIndex
    linears: Sequence[Sequence[Linear]]
    texts: Texts

    def sizes(self, settings: Search, plans: int) -> SearchSizes:
        """Return the sizes of a search with this number of plans."""
        dtype = settings.dtype_for(self.index.dtype)
        return SearchSizes(settings, self.index, self.linears, dtype, plans, self.texts.windows)


@stage_task(name="check_inputs", about=lambda settings, **_: title_of(settings.model))
def check_inputs(store: ArtifactStore, settings: Search) -> SearchInputs:
    """Check the model and the texts before the model is imported, and store the token counts.

    Raises:
        ValueError: see ``inspect_inputs``.
        OSError: see ``inspect_inputs``.
    """
    inputs = inspect_inputs(store, settings)
    inputs.texts.keep(store)
    return inputs


def inspect_inputs(store: ArtifactStore, settings: Search) -> SearchInputs:
    """Check the model and the texts of a search. Imports and writes nothing.

    Raises:
        ValueError: the model cannot be pruned; the plans, the windows or the tokenizer do not fit it; a text is too
            short or cannot be read.
        OSError: the model, a text or the store cannot be reached.
    """
    corpora = open_corpora(settings)
    stage = import_stage(settings.model)
    checkpoint = None if store.find(stage) is None else import_checkpoint(store, settings.model)
    index = inspect_source(settings.model) if checkpoint is None else checkpoint.index
    linears = linears_by_layer(index, settings.seqlen)
    check_plans(settings, linears, _matrices(index))
    prunable = settings.pruning("auto").prunable(linears)
    if settings.calibrate_on == "responses" and _has_experts(prunable):
        _require_known_tokens(settings.model, index)
    vocabulary = config_from_document(index.config, settings.model).get_text_config().vocab_size
    if checkpoint is None:
        tokenizer = tokenizer_of_source(settings.model)
        encoding = tokenizer.encoding_identity, tokenizer.load
    else:
        encoding = checkpoint.encoding_identity, checkpoint.tokenizer
    texts = count_texts(store, settings, corpora, *encoding, vocabulary)
    if settings.recover is not None:
        held_out_windows(settings.recover, settings.windows_to_recover_on(texts.windows["calibration"]))
    return SearchInputs(stage, checkpoint, index, linears, texts)


def _has_experts(linears: Sequence[Sequence[Linear]]) -> bool:
    return any(expert_linear(linear.name) for layer in linears for linear in layer)


def _require_known_tokens(model: str, index: CheckpointIndex) -> None:
    """Refuse a mixture of experts if it is not known which tokens an expert receives."""
    outline = outline_from_document(index.config, model)
    if (experts := experts_of_unknown_tokens(outline)) is not None:
        raise ValueError(
            f"calibrate_on is responses, and {outline.config.model_type} computes its experts in a forward pass of its own "
            f"({experts}), so it is not known which tokens an expert receives. Set calibrate_on to all, or "
            "leave the experts out (--exclude experts)."
        )


def _matrices(index: CheckpointIndex) -> list[str]:
    """Return the names of all modules of the layers that have a matrix as their weight."""
    return [
        f"{layer}.{name.removesuffix('.weight')}"
        for layer in range(index.num_layers)
        for name, weight in index.layer_tensors(layer).items()
        if name.endswith(".weight") and len(weight.entry.shape) == 2
    ]


def check_plans(
    settings: Search, linears: Sequence[Sequence[Linear]], matrices: Collection[str] = ()
) -> None:
    """Refuse plans that the shape of the model does not allow.

    Args:
        matrices: names that ``exclude`` may match without effect: linears that stay dense by default are not in
            ``linears``.

    Raises:
        ValueError: a beta is outside its legal range, a layer has nothing to prune, or an N:M pattern does not divide
            the inputs of a linear.
    """
    pruning = settings.pruning("auto")
    prunable = pruning.prunable(linears)
    names = [f"{index}.{linear.name}" for index, layer in enumerate(linears) for linear in layer]
    left = sum(map(len, prunable))
    is_known = settings.exclude is not None and any(re.search(settings.exclude, name) for name in matrices)
    if settings.exclude is not None and (left == 0 or (left == len(names) and not is_known)):
        found = "every one" if left == 0 else "none"
        raise ValueError(
            f"exclude is {settings.exclude!r}, which matches {found} of the model's {len(names)} linears, such as "
            f"{', '.join(names[:NAMED_LINEARS])}. Correct the expression, or leave it out."
        )
    if not all(prunable):
        empty = [index for index, layer in enumerate(prunable) if not layer]
        if settings.exclude is None:
            raise ValueError(
                f"the layers {empty} have no linear that can be pruned: text does not pass through them, or all of their "
                "linears stay dense. Use another model."
            )
        raise ValueError(
            f"{settings.exclude!r} leaves nothing to prune in the layers {empty}: every layer needs a linear. Exclude "
            "fewer of them."
        )
    for index, layer in enumerate(prunable):
        for linear in layer:
            if pruning.pattern_group is not None and linear.in_features % pruning.pattern_group:
                raise ValueError(
                    f"layer {index}, {linear.name} has {linear.in_features} inputs, which the pattern "
                    f"{settings.pattern} does not divide. Use another M, or exclude it (--exclude '{linear.name}')."
                )
    if settings.granularity == "expert" and not _has_experts(prunable):
        raise ValueError(
            "granularity is expert, but no expert of the model is pruned. Use granularity linear or layer, or a mixture of "
            "experts."
        )
    first_lanes(settings, expected_plans(settings, linears), linears, None)


def expected_plans(settings: Search, linears: Sequence[Sequence[Linear]]) -> tuple[SparsityPlan, ...]:
    """Return plans in the number that the search will have; measured scores are assumed to be equal for all layers."""
    prunable = settings.pruning("auto").prunable(linears)
    entries = sum(
        len(units_of([linear.name for linear in layer], settings.granularity)) for layer in prunable
    )
    return settings.allocation.plans(prunable, (0.0,) * entries)
