"""How fast a model reads and writes text on this machine, dense and with packed weights."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from layerwise.perplexity import perplexity
from layerwise.sparse.native import kernel
from layerwise.sparse.timing import cpu_name, in_turns, stream_bandwidth
from layerwise.sparse.ways import BFLOAT16, FLOAT32, ways_of, weight_bytes


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
        way: "torch float32", "torch bfloat16", "OpenVINO", "sparse" or "sparse int8".
        linears: how many of the model's linears it runs in its own manner (sparse: those with enough zeros).
        weight_bytes: of all linears with the head: what is read for every new token.
        prefill: tokens a second of the prompt; median over the rounds.
        decode: new tokens a second; median over the rounds of their median token.
        to_float32: how many times faster it decodes than torch in float32; median of the rounds' ratios. None where
            that was not measured.
        to_bfloat16: the same against torch in bfloat16; None likewise.
        of_limit: share of what the memory allows: seconds to read ``weight_bytes`` once by seconds for a token.
        perplexity: on the windows that were given; None without them.
    """

    way: str
    linears: int
    weight_bytes: int
    prefill: float
    decode: float
    to_float32: float | None
    to_bfloat16: float | None
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
        model: in the dtype that this CPU is fast in, on the CPU, with its zeros; its weights stay as they are, but ask
            for no gradients any more. In bfloat16 torch's float32 is measured too, in float32 nothing in bfloat16.
        windows: token ids, shape ``(windows, seqlen)``, for the perplexity of the ways in the model's own dtype.

    Raises:
        ValueError: the model is in neither.
    """
    if model.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"speed is measured in bfloat16 or float32, and the model is in {model.dtype}. Load it with "
            "dtype=torch.bfloat16."
        )
    ways, linears, left_out = ways_of(model.eval())
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
        bytes_read = weight_bytes(ways[name])
        seconds = statistics.median(token[name])
        return Speed(
            name,
            linears[name],
            bytes_read,
            settings.prompt_tokens / statistics.median(first[name]),
            1 / seconds,
            _ratio(token[FLOAT32], token[name]) if FLOAT32 in token else None,
            _ratio(token[BFLOAT16], token[name]) if BFLOAT16 in token else None,
            bytes_read / bandwidth / seconds,
            None if windows is None or ways[name].dtype != model.dtype else _perplexity(ways[name], windows),
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
