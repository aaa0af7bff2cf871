"""Generate calibration: the dense model answers prompts, and the answers become a text to calibrate on."""

import json
import logging
from collections.abc import Mapping, Sequence
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
from layerwise.tasks.generation.generation_settings import GenerationSettings, before_end
from layerwise.tasks.generation.prompts import Prompt, prompts_identity
from layerwise.tasks.generation.streamed_responses import prompt_groups, streamed_responses
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

logger = logging.getLogger(__name__)

TEXT_FILE = "calibration.jsonl"


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
    return Stage("generate_calibration", 1, {**settings.parameters, "ends": list(ends)}, inputs)


@stage_task(about=lambda checkpoint, prompts, **_: f"{model_title(checkpoint)}: {len(prompts)} prompts")
def generate_calibration(
    store: ArtifactStore,
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    execution: Execution,
) -> Artifact:
    """Let the model answer all prompts.

    Returns:
        An artifact with ``calibration.jsonl``: a row with the messages, or the text, of every prompt and its response.

    Raises:
        ValueError: there is too little memory for the model.
    """
    tokenizer = checkpoint.tokenizer()
    ends = _ends(store, checkpoint, tokenizer)

    def build(draft: Draft) -> None:
        if settings.way == "streamed":
            logger.info("%s, one for every token", _cost(checkpoint, prompts, settings.max_tokens))
            token_ids = [prompt.token_ids for prompt in prompts]
            written = streamed_responses(store, draft, checkpoint, token_ids, ends, settings, execution)
            rows = [
                prompt.with_response(response, tokenizer)
                for prompt, response in zip(prompts, written, strict=True)
            ]
        else:
            _require_memory(checkpoint, prompts, settings, execution)
            rows = _rows_in_memory(store, draft, checkpoint, prompts, ends, settings, execution)
        _write_rows(draft, rows)
        draft.facts |= {"responses": len(rows), **settings.parameters}

    return store.get_or_build(generate_stage(checkpoint, prompts, ends, settings), build)


def _rows_in_memory(
    store: ArtifactStore,
    draft: Draft,
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    ends: Sequence[int],
    settings: GenerationSettings,
    execution: Execution,
) -> list[dict[str, object]]:
    """Return the rows of all prompts, written by the whole model. Commits resume points, and resumes from one."""
    tokenizer = checkpoint.tokenizer()
    rows: list[dict[str, object]] = []
    first = 0
    if draft.resumed is not None:
        first = draft.resumed.step
        rows += map(json.loads, store.read(draft.resumed.state, TEXT_FILE).splitlines())
    batches = range(0, len(prompts), settings.batch)
    model = whole_model(checkpoint, settings.dtype, execution)
    title = f"generate calibration: {len(prompts)} responses"
    with (
        boundaries(draft, execution, lambda state: _write_rows(state, rows)) as reached,
        showing(title, len(prompts), len(rows), draft.resumed, unit="response") as show,
    ):
        for number, start in enumerate(batches[first:], first):
            together = prompts[start : start + settings.batch]
            seed = int(digest([settings.seed, number])[:15], 16)
            written = write_responses(model, [each.token_ids for each in together], ends, settings, seed)
            for prompt, token_ids in zip(together, written, strict=True):
                rows.append(prompt.with_response(token_ids, tokenizer))
            show(len(rows))
            reached(number + 1)
    return rows


def _write_rows(draft: Draft, rows: Sequence[Mapping[str, object]]) -> None:
    draft.write(TEXT_FILE, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


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
    return [before_end(row, ends) for row in written[:, longest:].tolist()]


def _ends(store: ArtifactStore, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response: those of generation_config.json and of config.json, and the tokenizer's."""
    found: list[object] = [tokenizer.eos_token_id, checkpoint.config.get_text_config().eos_token_id]
    if GENERATION_CONFIG in checkpoint.artifact.files:
        found.append(json.loads(store.read(checkpoint.artifact, GENERATION_CONFIG)).get("eos_token_id"))
    numbers = {number for each in found for number in (each if isinstance(each, list) else [each])}
    return sorted(number for number in numbers if isinstance(number, int))


def _require_memory(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], settings: GenerationSettings, execution: Execution
) -> None:
    index, device = checkpoint.index, execution.torch_device
    stored, computed = DTYPES[index.dtype].itemsize, DTYPES[settings.dtype].itemsize
    needed = (sum(index.layer_bytes) + index.outer_bytes) // stored * computed
    if needed > (free := free_memory(device)):
        raise ValueError(
            f"the model needs {size(needed)} of memory in {settings.dtype}, but {size(free)} are free on {device}. Use a "
            f"larger machine, or --way streamed, which holds one layer: {_cost(checkpoint, prompts, settings.max_tokens)}."
        )


def _cost(checkpoint: Checkpoint, prompts: Sequence[Prompt], max_tokens: int) -> str:
    passes = len(prompt_groups([prompt.token_ids for prompt in prompts], max_tokens)) * max_tokens
    layers = sum(checkpoint.index.layer_bytes)
    return f"up to {passes} passes over the {size(layers)} of the layers, {size(passes * layers)} of reads"
