"""Rates of computation on this machine, measured in a few seconds on one decoder layer with random weights."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.calibration.gram import PANEL, InputGram
from layerwise.calibration.statistics import InputStatistics
from layerwise.models.hidden_states import TOKENS_PER_FORWARD
from layerwise.models.skeleton import Linear
from layerwise.models.streaming import LOSS_POSITIONS, StreamedModel
from layerwise.pruners.layer_pruning import LayerInputs, LayerPruning, MaskPruner, Pruner

LONGEST = 1.0  # seconds for the forward pass; a layer that takes longer runs on fewer tokens
FEW_TOKENS = 64  # for the first forward pass, which decides on the number of tokens
WARM = 0.3  # seconds; shorter work is repeated, because its first run also loads code and allocates memory
# Sizes of the samples: some ten milliseconds each on one core.
RANKED = 1 << 21  # weights
CORRECTED = 256, 512  # rows and columns, for a pruner that corrects weights
HEAD_ROWS = 4096
GRAM_TOKENS = 256
PROBED_TOKENS = 2  # of the pass that finds the inputs of a layer's linears


@dataclass(frozen=True)
class ComputeRates:
    """Seconds of the parts of a search's computation, for the decoder layer that was measured.

    Attributes:
        layer: forward pass of the layer on one window.
        statistics: sums of squares of the layer's inputs for one window.
        grams: second moments of the layer's inputs for one window.
        load: copy of the layer to the device.
        preparing: work for all lanes together: ranking, or factors of second moments.
        pruning: pruning of the layer in one lane.
        head: logits and loss of one window.
    """

    layer: float
    statistics: float
    grams: float
    load: float
    preparing: float
    pruning: float
    head: float


@torch.no_grad()
def measure_compute(
    model: StreamedModel,
    index: int,
    weights: Mapping[str, Tensor],
    seqlen: int,
    pruner: Pruner,
    sparsities: Sequence[float],
    group: int | None = None,
) -> ComputeRates:
    """Measure one decoder layer of a model.

    Work that grows with a power of a size is measured on a small sample and scaled by its number of operations.

    Args:
        index: index of the layer.
        weights: weights of the layer in the dtype of the computation; their values do not matter.
        seqlen: length of a window, in tokens.
        sparsities: ascending sparsities of the layer in the lanes.
        group: M of an N:M pattern; None without a pattern.
    """
    began = time.perf_counter()
    with model.loaded(index, weights) as layer:
        _synchronize(model.device)
        load = time.perf_counter() - began
        linears = model.linears[index]
        inputs = _inputs(model, index, layer)
        widths = [width for width, _ in inputs]
        forward = _forward_pass(model, index, layer, seqlen)
        largest = max(linears, key=lambda linear: linear.numel)
        weight = largest.oriented(layer.get_submodule(largest.name).weight)  # type: ignore[arg-type]
        sample = weight.contiguous().view(-1)
        preparing, pruning = _pruning(pruner, linears, widths, weight, sparsities, group)
        return ComputeRates(
            layer=forward,
            statistics=seqlen * _statistics(sample, inputs),
            grams=seqlen * _grams(sample, inputs),
            load=load,
            preparing=preparing,
            pruning=pruning,
            head=_head(model, sample, seqlen),
        )


def _forward_pass(model: StreamedModel, index: int, layer: nn.Module, seqlen: int) -> float:
    """Return the seconds of one window, from as many tokens of a batch as ``LONGEST`` allows."""

    def seconds(windows: int, tokens: int) -> float:
        states = _random_states(model, windows, tokens)
        return _seconds(lambda: states.copy_(model.run_layer(index, layer, states)), model.device)

    linears = model.linears[index]
    few = min(seqlen, FEW_TOKENS)
    first = seconds(1, few)
    window = first * _operations(linears, seqlen) / _operations(linears, few)
    if window <= LONGEST:
        windows = min(max(1, TOKENS_PER_FORWARD // seqlen), math.floor(LONGEST / window))
        return seconds(windows, seqlen) / windows
    tokens = min(seqlen, max(few, int(few * LONGEST / first)))
    measured = first if tokens == few else seconds(1, tokens)
    return measured * _operations(linears, seqlen) / _operations(linears, tokens)


def _random_states(model: StreamedModel, windows: int, seqlen: int) -> Tensor:
    """Return states with random hidden states. Not zeros: experts may take tokens of zeros for those of other experts."""
    states = model.embed(torch.zeros(windows, seqlen, dtype=torch.long)).clone()
    hidden_states = model.hidden_states(states)
    hidden_states.copy_(torch.randn(hidden_states.shape))
    return states


def _operations(linears: Sequence[Linear], tokens: int) -> int:
    """Return the multiplications of one layer for a window: its linears, and the two products of attention."""
    width = min(linear.in_features for linear in linears)
    return tokens * sum(linear.numel for linear in linears) + 2 * tokens**2 * width


def _inputs(model: StreamedModel, index: int, layer: nn.Module) -> list[tuple[int, float]]:
    """Return the width of every distinct input of the layer's linears, and its share of the tokens (less for experts)."""
    inputs: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not any(arguments[0] is other for other in inputs):
            inputs.append(arguments[0])

    hooks = [
        layer.get_submodule(linear.name).register_forward_pre_hook(note) for linear in model.linears[index]
    ]
    try:
        model.run_layer(index, layer, _random_states(model, 1, PROBED_TOKENS))
    finally:
        for hook in hooks:
            hook.remove()
    return [(tensor.shape[-1], tensor.shape[:-1].numel() / PROBED_TOKENS) for tensor in inputs]


def _pruning(
    pruner: Pruner,
    linears: Sequence[Linear],
    widths: Sequence[int],
    weight: Tensor,
    sparsities: Sequence[float],
    group: int | None,
) -> tuple[float, float]:
    """Return the seconds for all lanes together, and for each lane."""
    by_mask = isinstance(pruner, MaskPruner)
    if by_mask:
        columns = weight.shape[1]
        rows = min(len(weight), max(1, RANKED // columns))
    else:
        rows, columns = (min(size, most) for size, most in zip(weight.shape, CORRECTED, strict=True))
    columns -= columns % (group or 1)
    linear = Linear("sample", rows, columns, transposed=False)
    sample = weight[:rows, :columns].contiguous()
    statistics = {linear.name: InputStatistics(torch.rand(columns, dtype=torch.float64), tokens=1)}
    tokens = torch.randn(2 * columns, 0 if by_mask else columns)
    moments, sums = tokens.T @ tokens, tokens.sum(dim=0)
    unit = linear.numel // (group or linear.numel)  # an N:M pattern removes multiples of it
    counts = [round(sparsity * linear.numel / unit) * unit for sparsity in sparsities]

    taken: list[tuple[float, float]] = []

    def prune() -> None:
        inputs: LayerInputs = statistics
        if not by_mask:  # the pruner overwrites the moments
            inputs = [([linear.name], InputGram(moments.clone(), len(tokens), sums))]
        began = time.perf_counter()
        layer = LayerPruning(pruner, group, 0, [linear], {linear.weight_name: sample}, inputs)
        prunings = layer.in_lanes([sample.clone()], [counts])
        _synchronize(weight.device)
        prepared = time.perf_counter()
        for lane in range(len(counts)):
            for each in prunings:
                each.visit(lane)
        _synchronize(weight.device)
        taken.append((prepared - began, (time.perf_counter() - prepared) / len(counts)))

    _seconds(prune, weight.device)
    # Without the first run, as in _seconds.
    together, alone = (sum(part) / len(part) for part in zip(*(taken[1:] or taken), strict=True))
    if by_mask:
        share = sum(each.numel for each in linears) / linear.numel
        return together * share, alone * share
    # A factor takes columns^3 operations, the correction of a row columns^2.
    factors = sum((width / columns) ** 3 for width in widths)
    return together * factors, alone * sum(
        each.numel / linear.numel * each.in_features / columns for each in linears
    )


def _statistics(sample: Tensor, widths: Sequence[tuple[int, float]]) -> float:
    """Return the seconds of one token.

    Args:
        widths: see ``_inputs``.
    """
    inputs = sample[: min(len(sample), RANKED)].view(1, -1)
    seconds = _seconds(lambda: inputs.float().square().sum(dim=0), sample.device)
    return seconds / inputs.numel() * sum(width * share for width, share in widths)


def _grams(sample: Tensor, widths: Sequence[tuple[int, float]]) -> float:
    """Return the seconds of one token.

    Args:
        widths: see ``_inputs``.
    """
    width = min(max(widths)[0], PANEL)
    inputs = sample[: GRAM_TOKENS * width // width * width].view(-1, width)
    gram = InputGram.empty(width, sample.device)
    seconds = _seconds(lambda: gram.add(inputs), sample.device)

    def products(columns: int) -> int:  # blocks on and right of the diagonal
        return sum(min(PANEL, columns - start) * (columns - start) for start in range(0, columns, PANEL))

    operations = sum(products(columns) * share for columns, share in widths)
    return seconds / len(inputs) * operations / products(width)


def _head(model: StreamedModel, sample: Tensor, seqlen: int) -> float:
    """Return the seconds of one window."""
    vocabulary, width = model.model.config.get_text_config().vocab_size, _hidden_size(model)
    rows = min(vocabulary, HEAD_ROWS, len(sample) // width)
    head = sample[: rows * width].view(rows, width)
    tokens = min(seqlen, LOSS_POSITIONS)
    states = torch.randn(tokens, width).to(model.device, model.dtype)
    targets = torch.zeros(tokens, dtype=torch.long, device=model.device)

    def loss() -> None:
        nn.functional.cross_entropy(nn.functional.linear(states, head).float(), targets)

    return _seconds(loss, model.device) * vocabulary / rows * seqlen / tokens


def _hidden_size(model: StreamedModel) -> int:
    return model.model.config.get_text_config().hidden_size


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the time that ``work`` takes; the mean of several runs after the first if it is short."""

    def run() -> float:
        began = time.perf_counter()
        work()
        _synchronize(device)
        return time.perf_counter() - began

    if (first := run()) > WARM:
        return first
    runs = [run()]
    while sum(runs) < WARM / 2:
        runs.append(run())
    return sum(runs) / len(runs)


def _synchronize(device: torch.device) -> None:
    torch.get_device_module(device).synchronize()
