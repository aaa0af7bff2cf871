"""Speed of a model on this machine when it reads a prompt and generates text, dense and sparse."""

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
from layerwise.sparse.engines import BFLOAT16, FLOAT32, engines_of, linears_run_by, weight_bytes
from layerwise.sparse.native import kernel
from layerwise.sparse.speed_settings import SpeedSettings
from layerwise.sparse.timing import cpu_name, in_turns, stream_bandwidth


@dataclass(frozen=True)
class Speed:
    """Speed of one engine.

    Attributes:
        way: name of the engine: "torch float32", "torch bfloat16", "OpenVINO", "sparse" or "sparse int8".
        linears: number of linears that the engine runs itself (sparse: those with enough zeros).
        weight_bytes: size of the weights of all linears, including the head: the memory read for every new token.
        prefill: prompt tokens per second; median over the rounds.
        decode: new tokens per second, from the median over the rounds of the median time per token.
        to_float32: decoding speed divided by that of torch in float32; median of the ratios of the rounds. None if the
            latter was not measured.
        to_bfloat16: the same for torch in bfloat16.
        of_limit: fraction of the memory-bound speed: time to read ``weight_bytes`` once, divided by time per token.
        perplexity: perplexity on the given windows; None without windows.
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
    """Speeds of all engines, and the machine.

    Attributes:
        cpu: model name of the CPU.
        level: instruction set of the sparse kernel; None if the kernel is not available.
        threads: number of threads of torch and of the kernel.
        bandwidth: memory bandwidth of these threads, in bytes per second.
        speeds: speed of every measured engine, in the order of the table.
        left_out: engines that were not measured: name and reason.
    """

    cpu: str
    level: str | None
    threads: int
    bandwidth: float
    speeds: tuple[Speed, ...]
    left_out: Mapping[str, str]


class _Clock(BaseStreamer):
    """Streamer that records the time of every token; its first call is the prompt, before the computation."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing; tokens are not buffered."""


@dataclass(frozen=True)
class _Times:
    """Times of one generation, in seconds.

    Attributes:
        prompt: time until the first new token.
        token: median time between new tokens.
    """

    prompt: float
    token: float


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel, settings: SpeedSettings, windows: Tensor | None = None
) -> SpeedTable:
    """Run ``generate`` with every engine available on this machine, with batch size 1 and with the cache.

    Args:
        model: pruned model on the CPU, in the dtype in which this CPU is fastest. Its weights do not change, but no
            longer require gradients. For a bfloat16 model, torch in float32 is measured as well; for a float32 model,
            nothing is measured in bfloat16.
        settings: numbers of tokens and rounds.
        windows: token ids, shape ``(windows, seqlen)``, for the perplexity of the engines in the model's own dtype.

    Raises:
        ValueError: the model is neither in bfloat16 nor in float32.
    """
    if model.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"speed is measured in bfloat16 or float32, but the model is in {model.dtype}. Load it with "
            "dtype=torch.bfloat16 or dtype=torch.float32."
        )
    engines, left_out = engines_of(model.eval())
    times = _times_of(engines, settings)
    bandwidth, native = stream_bandwidth(), kernel()
    speeds = []
    for name, engine in engines.items():
        measured = None if windows is None or engine.dtype != model.dtype else _perplexity(engine, windows)
        speeds.append(_speed(name, engine, times, settings.prompt_tokens, bandwidth, measured))
    level = native.level if native else None
    return SpeedTable(cpu_name(), level, torch.get_num_threads(), bandwidth, tuple(speeds), left_out)


def _times_of(engines: Mapping[str, PreTrainedModel], settings: SpeedSettings) -> dict[str, list[_Times]]:
    """Measure every engine in every round, with the same random prompt."""
    vocabulary = next(iter(engines.values())).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, settings.prompt_tokens), generator=generator)
    calls = {
        name: partial(_generate, engine, prompt, settings.new_tokens) for name, engine in engines.items()
    }
    return in_turns(calls, settings.rounds)


def _generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> _Times:
    clock = _Clock()
    # The model's own settings may enable sampling or stop early.
    greedy = GenerationConfig(
        min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, use_cache=True
    )
    generation: Any = model  # transformers' type hints do not accept a custom streamer
    mask = torch.ones_like(prompt)
    generation.generate(prompt, attention_mask=mask, generation_config=greedy, streamer=clock)
    began, *tokens = clock.times
    return _Times(tokens[0] - began, statistics.median(late - early for early, late in pairwise(tokens)))


def _speed(
    name: str,
    engine: PreTrainedModel,
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

    bytes_read, seconds = weight_bytes(engine), statistics.median(own)
    return Speed(
        way=name,
        linears=linears_run_by(engine),
        weight_bytes=bytes_read,
        prefill=prompt_tokens / statistics.median(each.prompt for each in times[name]),
        decode=1 / seconds,
        to_float32=ratio(FLOAT32),
        to_bfloat16=ratio(BFLOAT16),
        of_limit=bytes_read / bandwidth / seconds,
        perplexity=perplexity,
    )


def _perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Compute the perplexity by the GPTQ/Wanda convention."""
    losses = []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        losses.append(finite_loss(cross_entropy(logits, window[1:]).item()))
    return perplexity(losses)
