"""Generate calibration: the dense model answers prompts, and the answers become a text to calibrate on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from layerwise.display.byte_size import size
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.generation.prompts import Prompt, prompts_identity
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import DTYPES
from layerwise.tasks.models.whole_model import whole_model
from layerwise.tasks.recovery.distillation_memory import free_memory
from layerwise.tasks.results.run_names import model_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sources.checkpoint_files import GENERATION_CONFIG

TEXT_FILE = "calibration.jsonl"


@dataclass(frozen=True)
class GenerationSettings:
    """Settings that decide what the model writes.

    Attributes:
        dtype: dtype that the model computes in.
        max_tokens: maximum length of a response, in tokens.
        temperature: of the softmax that tokens are drawn from; 0 takes the most likely token.
        batch: prompts per forward pass. It is part of the key, because the last bits of every logit depend on it.
        seed: seed of the draws.
    """

    dtype: str
    max_tokens: int
    temperature: float
    batch: int
    seed: int


def generate_stage(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], ends: Sequence[int], settings: GenerationSettings
) -> Stage:
    """Describe the responses to prompts.

    Args:
        ends: tokens that end a response.
    """
    inputs = {
        "checkpoint": checkpoint.identity,
        "tokenizer": checkpoint.encoding_identity,
        "prompts": prompts_identity(prompts),
    }
    return Stage("generate_calibration", 1, {**asdict(settings), "ends": list(ends)}, inputs)


@stage_task(about=lambda checkpoint, prompts, **_: f"{model_title(checkpoint)}: {len(prompts)} prompts")
def generate_calibration(
    store: ArtifactStore,
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    execution: Execution,
) -> Artifact:
    """Let the model answer all prompts, with the whole model in memory.

    Returns:
        An artifact with ``calibration.jsonl``: a row with the messages, or the text, of every prompt and its response.

    Raises:
        ValueError: there is too little memory for the model.
    """
    tokenizer = checkpoint.tokenizer()
    ends = _ends(store, checkpoint, tokenizer)

    def build(draft: Draft) -> None:
        _require_memory(checkpoint, settings.dtype, execution)
        rows: list[dict[str, object]] = []
        first = 0
        if draft.resumed is not None:
            first = draft.resumed.step
            rows += map(json.loads, store.read(draft.resumed.state, TEXT_FILE).splitlines())
        batches = range(0, len(prompts), settings.batch)

        def write_rows(state: Draft) -> None:
            state.write(TEXT_FILE, "".join(f"{json.dumps(row)}\n" for row in rows).encode())

        model = whole_model(checkpoint, settings.dtype, execution)
        title = f"generate calibration: {len(prompts)} responses"
        with (
            boundaries(draft, execution, write_rows) as reached,
            showing(title, len(batches), first, draft.resumed, unit="batch") as show,
        ):
            for number, start in enumerate(batches[first:], first):
                together = prompts[start : start + settings.batch]
                seed = int(digest([settings.seed, number])[:15], 16)
                written = write_responses(model, [each.token_ids for each in together], ends, settings, seed)
                for prompt, token_ids in zip(together, written, strict=True):
                    rows.append(prompt.with_response(token_ids, tokenizer))
                show(number + 1)
                reached(number + 1)
        write_rows(draft)
        draft.facts |= {"responses": len(rows), **asdict(settings)}

    return store.get_or_build(generate_stage(checkpoint, prompts, ends, settings), build)


def write_responses(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    settings: GenerationSettings,
    seed: int,
) -> list[list[int]]:
    """Return the tokens that the model writes after each prompt, without the token that ends the response.

    Args:
        prompts: token ids of every prompt.
        ends: tokens that end a response.
        seed: seed of the draws for these prompts.
    """
    longest = max(map(len, prompts))
    # Padded on the left, so that all responses begin at the same position. The mask hides the padding, whatever its token is.
    padding = ends[0] if ends else 0
    input_ids = torch.tensor([[padding] * (longest - len(each)) + list(each) for each in prompts])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature:
        # The whole distribution: a model's own top_k and top_p would leave out rare tokens, which also need calibration.
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    how = GenerationConfig(
        max_new_tokens=settings.max_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=padding,
        use_cache=True,
        **sampling,
    )
    own = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(own, device_type=own[0].type if own else "cuda"), torch.inference_mode():
        torch.manual_seed(seed)
        written: Tensor = model.generate(  # type: ignore[operator]
            input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=how
        )
    return [_before_end(row, ends) for row in written[:, longest:].tolist()]


def _before_end(token_ids: list[int], ends: Sequence[int]) -> list[int]:
    end = next((position for position, token in enumerate(token_ids) if token in ends), len(token_ids))
    return token_ids[:end]


def _ends(store: ArtifactStore, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response: those of generation_config.json and of config.json, and the tokenizer's."""
    found: list[object] = [tokenizer.eos_token_id, checkpoint.config.get_text_config().eos_token_id]
    if GENERATION_CONFIG in checkpoint.artifact.files:
        found.append(json.loads(store.read(checkpoint.artifact, GENERATION_CONFIG)).get("eos_token_id"))
    numbers = {number for each in found for number in (each if isinstance(each, list) else [each])}
    return sorted(number for number in numbers if isinstance(number, int))


def _require_memory(checkpoint: Checkpoint, dtype: str, execution: Execution) -> None:
    index, device = checkpoint.index, execution.torch_device
    stored, computed = DTYPES[index.dtype].itemsize, DTYPES[dtype].itemsize
    needed = (sum(index.layer_bytes) + index.outer_bytes) // stored * computed
    if needed > (free := free_memory(device)):
        raise ValueError(
            f"the model needs {size(needed)} of memory in {dtype}, but {size(free)} are free on {device}. The whole model "
            "generates in memory: use a larger machine, or generate the text with another program and give the file."
        )
