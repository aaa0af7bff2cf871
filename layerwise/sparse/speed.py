"""How fast a model reads and writes text on this machine, dense and with packed weights."""

import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.pytorch_utils import Conv1D

from layerwise.perplexity import perplexity
from layerwise.sparse.accelerate import accelerate
from layerwise.sparse.bitmask_linear import BitmaskLinear
from layerwise.sparse.native import kernel
from layerwise.sparse.openvino_linear import OpenVinoLinear, has_openvino
from layerwise.sparse.timing import cpu_name, in_turns, stream_bandwidth

WAYS = FLOAT32, BFLOAT16, OPENVINO, SPARSE, INT8 = (
    "torch float32",
    "torch bfloat16",
    "OpenVINO bfloat16",
    "sparse",
    "sparse int8",
)


@dataclass(frozen=True)
class SpeedSettings:
    """What is run: every way reads a random prompt and writes after it, in turns.

    Raises:
        ValueError: a number below 1; fewer than two new tokens, of which only those after the first are decoded alone.
    """

    prompt_tokens: int = 64
    new_tokens: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.rounds) < 1 or self.new_tokens < 2:
            raise ValueError(
                f"a prompt of {self.prompt_tokens} tokens, {self.new_tokens} new ones and {self.rounds} rounds measure "
                "nothing. Use 1 or more; of new tokens 2 or more."
            )


@dataclass(frozen=True)
class Speed:
    """One way of running the model.

    Attributes:
        way: "torch float32", "torch bfloat16", "OpenVINO bfloat16", "sparse" or "sparse int8".
        linears: how many of the model's linears it runs in its own manner (sparse: those with enough zeros).
        weight_bytes: of all linears with the head: what is read for every new token.
        prefill: tokens a second of the prompt; median over the rounds.
        decode: new tokens a second; median over the rounds of their median token.
        to_float32: how many times faster it decodes than torch in float32; median of the rounds' ratios. None where
            that was not measured.
        to_bfloat16: the same against torch in bfloat16.
        of_limit: share of what the memory allows: seconds to read ``weight_bytes`` once by seconds for a token.
        perplexity: on the windows that were given; None without them.
    """

    way: str
    linears: int
    weight_bytes: int
    prefill: float
    decode: float
    to_float32: float | None
    to_bfloat16: float
    of_limit: float
    perplexity: float | None


@dataclass(frozen=True)
class SpeedTable:
    """What was measured, and of what.

    Attributes:
        cpu: what it calls itself.
        level: instructions of the sparse kernel; None where it was not built.
        threads: of torch and of the kernel.
        bandwidth: bytes a second that these threads read from memory.
        speeds: in the order of the table.
        left_out: ways that were not measured, with the reason.
    """

    cpu: str
    level: str | None
    threads: int
    bandwidth: float
    speeds: tuple[Speed, ...]
    left_out: Mapping[str, str]


@dataclass
class _Clock(BaseStreamer):
    """Notes when tokens come: the first call is the prompt, before anything is computed."""

    times: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel, settings: SpeedSettings, windows: Tensor | None = None
) -> SpeedTable:
    """Run ``model`` by ``generate`` in every way that this machine has, batch of one, with the cache.

    Args:
        model: in bfloat16, on the CPU, with its zeros; its weights stay as they are, but ask for no gradients any more.
        windows: token ids, shape ``(windows, seqlen)``, for the perplexity; float32 is left out, which is not the model
            as it is stored.

    Raises:
        ValueError: the model is not in bfloat16.
    """
    if model.dtype != torch.bfloat16:
        raise ValueError(
            f"speed is compared in bfloat16, and the model is in {model.dtype}. Load it with dtype=torch.bfloat16."
        )
    ways, linears, left_out = _ways(model.eval())
    clocks: dict[str, list[_Clock]] = {name: [] for name in ways}
    prompt = torch.randint(
        model.config.get_text_config().vocab_size,
        (1, settings.prompt_tokens),
        generator=torch.Generator().manual_seed(0),
    )
    calls: dict[str, Callable[[], object]] = {
        name: partial(_generate, way, prompt, settings.new_tokens, clocks[name]) for name, way in ways.items()
    }
    in_turns(calls, settings.rounds)
    first = {name: [clock.times[1] - clock.times[0] for clock in found[1:]] for name, found in clocks.items()}
    token = {
        name: [
            statistics.median(
                late - early for early, late in zip(clock.times[1:], clock.times[2:], strict=False)
            )
            for clock in found[1:]
        ]
        for name, found in clocks.items()
    }
    bandwidth = stream_bandwidth()

    def speed(name: str) -> Speed:
        bytes_read = _weight_bytes(ways[name])
        seconds = statistics.median(token[name])
        return Speed(
            name,
            linears[name],
            bytes_read,
            settings.prompt_tokens / statistics.median(first[name]),
            1 / seconds,
            _ratio(token[FLOAT32], token[name]) if FLOAT32 in token else None,
            _ratio(token[BFLOAT16], token[name]),
            bytes_read / bandwidth / seconds,
            None if windows is None or name == FLOAT32 else _perplexity(ways[name], windows),
        )

    native = kernel()
    return SpeedTable(
        cpu_name(),
        native.level if native else None,
        torch.get_num_threads(),
        bandwidth,
        tuple(speed(name) for name in ways),
        left_out,
    )


def _ways(
    model: PreTrainedModel,
) -> tuple[dict[str, PreTrainedModel], dict[str, int], dict[str, str]]:
    """The model in every way, how many linears each runs, and the ways that are not to be had here."""
    ways, linears, left_out = {BFLOAT16: model}, {BFLOAT16: len(_linears(model))}, {}
    for name, int8 in ((SPARSE, False), (INT8, True)):
        packed = _sharing(model)
        done = accelerate(packed, int8)
        if done.sparse:
            ways[name], linears[name] = packed, len(done.sparse)
        else:
            reasons = ", ".join(sorted(set(done.dense.values())))
            left_out[name] = f"no linear runs sparse: {reasons}"
    bytes_of = sum(parameter.nbytes for parameter in model.parameters())
    if not has_openvino():
        left_out[OPENVINO] = "not installed (pip install openvino): a good dense engine to compare with"
    elif (reason := _no_room(bytes_of)) is not None:
        left_out[OPENVINO] = reason
    else:
        ways[OPENVINO], linears[OPENVINO] = _by_openvino(model)
    if (reason := _no_room(2 * bytes_of)) is not None:
        left_out[FLOAT32] = reason
    else:
        ways[FLOAT32], linears[FLOAT32] = deepcopy(model).float(), linears[BFLOAT16]
    return {name: ways[name] for name in WAYS if name in ways}, linears, left_out


def _no_room(needed: int) -> str | None:
    """Why a copy of so many bytes is not made, or None; it is to leave a tenth of itself and a GB free."""
    free = psutil.virtual_memory().available
    if 1.1 * needed + 1e9 < free:
        return None
    return f"would need {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free"


def _by_openvino(model: PreTrainedModel) -> tuple[PreTrainedModel, int]:
    """The model with OpenVINO's linears, and how many they are."""
    other = _sharing(model)
    replaced = {name: module for name, module in _linears(other).items() if type(module) is nn.Linear}
    for name, module in replaced.items():
        owner, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(owner), leaf, OpenVinoLinear(module))
    return other, len(replaced)


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own and the same parameters."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | BitmaskLinear | OpenVinoLinear)
    }


def _weight_bytes(model: nn.Module) -> int:
    """Of all linears: what is read for every new token."""
    return sum(_bytes_of(module) for module in _linears(model).values())


def _bytes_of(module: nn.Module) -> int:
    if isinstance(module, BitmaskLinear):
        return module.panels.nbytes
    if isinstance(module, OpenVinoLinear):
        return module.weight_bytes
    assert isinstance(module.weight, Tensor)
    return module.weight.nbytes


def _generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int, clocks: list[_Clock]) -> None:
    clocks.append(_Clock())
    # The model's own settings may ask for sampling or stop early.
    greedy = GenerationConfig(
        min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, use_cache=True
    )
    generation: Any = model  # transformers' types take no streamer of one's own
    generation.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy, streamer=clocks[-1]
    )


def _ratio(base: list[float], other: list[float]) -> float:
    return statistics.median(ours / its for ours, its in zip(base, other, strict=True))


def _perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """By the GPTQ/Wanda convention."""
    losses = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        losses.append(cross_entropy(logits, window[1:]).item())
    return perplexity(losses)
