"""Experts that few calibration tokens reach: statistics of all experts of the layer replace theirs.

The router of a mixture of experts sends every token to a few experts, so some experts get few of the calibration tokens,
or none. The norms or second moments of so few inputs are mostly chance. Such an expert's linear is pruned by the inputs
of the same linear of all experts of the layer, added up.
"""

from collections.abc import Mapping

import torch

from layerwise.calibration.gram import InputGram, linears_by_input
from layerwise.calibration.statistics import InputStatistics
from layerwise.models.expert_names import expert_linear, kind_of

# Tokens that the norms of an input need: the mean of 64 squares of Gaussian values is within 18 % of the truth (one
# standard deviation), hence the norm within 9 %, while the norms of different channels of a layer differ several times.
TOKENS_FOR_NORMS = 64


def tokens_for_moments(in_features: int) -> int:
    """Return the number of tokens that second moments need: with fewer than inputs, their matrix is singular.

    A correction of weights would then fit these tokens exactly, and no others.
    """
    return max(TOKENS_FOR_NORMS, in_features)


def statistics_to_prune_by(statistics: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
    """Return the statistics of a layer; those of linears of experts with few tokens are replaced.

    The replacement is the sum over all experts of the layer, for the same linear, scaled to ``TOKENS_FOR_NORMS`` tokens,
    so that scores of different linears can be compared.

    Args:
        statistics: of all linears, by name in the layer.
    """
    kinds: dict[str, list[str]] = {}
    for name in statistics:
        if expert_linear(name) is not None:
            kinds.setdefault(kind_of(name), []).append(name)
    replaced: dict[str, InputStatistics] = {}
    for names in kinds.values():
        few = [name for name in names if statistics[name].tokens < TOKENS_FOR_NORMS]
        tokens = sum(statistics[name].tokens for name in names)
        if few and tokens:
            total = torch.stack([statistics[name].sum_of_squares for name in names]).sum(dim=0)
            kept = min(tokens, TOKENS_FOR_NORMS)
            replaced |= dict.fromkeys(few, InputStatistics(total * (kept / tokens), kept))
    return {name: replaced.get(name, inputs) for name, inputs in statistics.items()}


def tokens_of_experts(statistics: Mapping[str, InputStatistics]) -> dict[str, list[int]]:
    """Return the number of calibration tokens of every expert of a layer, by the name of the experts' module."""
    tokens: dict[str, dict[int, int]] = {}
    for name, inputs in statistics.items():
        if (place := expert_linear(name)) is not None:
            tokens.setdefault(place.pool, {})[place.expert] = inputs.tokens
    return {pool: [count for _, count in sorted(of_pool.items())] for pool, of_pool in tokens.items()}


def moments_to_prune_by(grams: Mapping[str, InputGram]) -> dict[str, InputGram]:
    """Return the Gram matrices of a layer; those of linears of experts with few tokens are replaced.

    The replacement is the sum over all experts of the layer, for the same linears, scaled to the tokens that are needed.

    Args:
        grams: of all linears, by name in the layer; linears that share their input have the same object, also in the result.
    """
    kinds: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for names in linears_by_input(grams):
        if expert_linear(names[0]) is not None:
            kinds.setdefault(tuple(map(kind_of, names)), []).append(names)
    replaced: dict[str, InputGram] = {}
    for experts in kinds.values():
        every = [grams[names[0]] for names in experts]
        needed = tokens_for_moments(len(every[0].gram))
        few = [names for names in experts if grams[names[0]].tokens < needed]
        tokens = sum(gram.tokens for gram in every)
        if few and tokens:
            total = torch.zeros_like(every[0].gram)
            for gram in every:
                total += gram.gram
            kept = min(tokens, needed)
            sums = [gram.sums for gram in every if gram.sums is not None]  # of all experts, or of none
            sum_of_all = torch.stack(sums).sum(dim=0) * (kept / tokens) if sums else None
            pooled = InputGram(total.mul_(kept / tokens), kept, sum_of_all)
            replaced |= {name: pooled for names in few for name in names}
    return {name: replaced.get(name, gram) for name, gram in grams.items()}
