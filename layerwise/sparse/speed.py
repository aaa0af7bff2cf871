"""How fast a model reads and writes text on this machine, dense and with packed weights."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from layerwise.scoring.perplexity import finite_loss, perplexity
from layerwise.sparse.engines import BFLOAT16, FLOAT32, linears_run_by, ways_of, weight_bytes
from layerwise.sparse.native import kernel
from layerwise.sparse.speed_settings import SpeedSettings
from layerwise.sparse.timing import cpu_name, in_turns, stream_bandwidth


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


class _Clock(BaseStreamer):
    """Notes when tokens come: the first call is the prompt, before anything is computed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True)
class _Times:
    """Of one text, in seconds.

    Attributes:
        prompt: until the first new token.
        token: from one new token to the next; the median.
    """

    prompt: float
    token: float


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
    ways, left_out = ways_of(model.eval())
    times = _times_of(ways, settings)
    bandwidth, native = stream_bandwidth(), kernel()
    speeds = []
    for name, way in ways.items():
        measured = None if windows is None or way.dtype != model.dtype else _perplexity(way, windows)
        speeds.append(_speed(name, way, times, settings.prompt_tokens, bandwidth, measured))
    level = native.level if native else None
    return SpeedTable(cpu_name(), level, torch.get_num_threads(), bandwidth, tuple(speeds), left_out)


def _times_of(ways: Mapping[str, PreTrainedModel], settings: SpeedSettings) -> dict[str, list[_Times]]:
    """Of every way in every round, for the same random prompt."""
    vocabulary = next(iter(ways.values())).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, settings.prompt_tokens), generator=generator)
    calls = {name: partial(_generate, way, prompt, settings.new_tokens) for name, way in ways.items()}
    return in_turns(calls, settings.rounds)


def _generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> _Times:
    clock = _Clock()
    # The model's own settings may ask for sampling or stop early.
    greedy = GenerationConfig(
        min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, use_cache=True
    )
    generation: Any = model  # transformers' types take no streamer of one's own
    mask = torch.ones_like(prompt)
    generation.generate(prompt, attention_mask=mask, generation_config=greedy, streamer=clock)
    began, *tokens = clock.times
    return _Times(tokens[0] - began, statistics.median(late - early for early, late in pairwise(tokens)))


def _speed(
    name: str,
    way: PreTrainedModel,
    times: Mapping[str, Sequence[_Times]],
    prompt_tokens: int,
    bandwidth: float,
    perplexity: float | None,
) -> Speed:
    own = [each.token for each in times[name]]

    def ratio(base: str) -> float | None:
        if base not in times:
            return None
        return statistics.median(other.token / token for other, token in zip(times[base], own, strict=True))

    bytes_read, seconds = weight_bytes(way), statistics.median(own)
    return Speed(
        way=name,
        linears=linears_run_by(way),
        weight_bytes=bytes_read,
        prefill=prompt_tokens / statistics.median(each.prompt for each in times[name]),
        decode=1 / seconds,
        to_float32=ratio(FLOAT32),
        to_bfloat16=ratio(BFLOAT16),
        of_limit=bytes_read / bandwidth / seconds,
        perplexity=perplexity,
    )


def _perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """By the GPTQ/Wanda convention."""
    losses = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        losses.append(finite_loss(cross_entropy(logits, window[1:]).item()))
    return perplexity(losses)
