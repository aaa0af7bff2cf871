"""Responses of a model that is streamed: every token is one pass over the layers, for many prompts together.

A pass runs all tokens of all sequences again. No keys and values are kept, so every model that can be streamed can write,
with the memory of one layer and of the hidden states.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.models.skeleton import positions_of
from layerwise.models.streaming import StreamedModel
from layerwise.scoring.continuations import PADDING, advance, padded_length
from layerwise.storage.draft import Draft
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.generation.generation_settings import GenerationSettings, before_end
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.streamed import streamed_model
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.layer_boundaries import boundaries
from layerwise.tasks.running.progress import showing

# Tokens whose hidden states are kept at a time: 2 GiB in 16 bits at the width of a 7B model.
TOKENS_AT_ONCE = 1 << 18

ROWS_AT_ONCE = 64  # whose probabilities are in memory, in float64: 78 MB for a vocabulary of 152k

WRITTEN_FILE = "written.json"


def prompt_groups(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[range]:
    """Group consecutive prompts that are answered together: as many as have ``TOKENS_AT_ONCE`` tokens with their responses.

    Returns:
        Numbers of the prompts of every group.
    """
    groups, start, tokens = [], 0, 0
    for number, prompt in enumerate(prompts):
        length = len(prompt) + max_tokens
        if number > start and tokens + length > TOKENS_AT_ONCE:
            groups.append(range(start, number))
            start, tokens = number, 0
        tokens += length
    return [*groups, range(start, len(prompts))]


def streamed_responses(
    store: ArtifactStore,
    draft: Draft,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    settings: GenerationSettings,
    execution: Execution,
) -> list[list[int]]:
    """Return the tokens that the model writes after each prompt, without the token that ends the response.

    Commits resume points after complete passes, and resumes from one.

    Args:
        prompts: token ids of every prompt.
        ends: tokens that end a response.
    """
    groups = prompt_groups(prompts, settings.max_tokens)
    written: list[list[int]] = [[] for _ in prompts]
    first, total = 0, len(groups) * settings.max_tokens
    if draft.resumed is not None:
        first = draft.resumed.step
        written = json.loads(store.read(draft.resumed.state, WRITTEN_FILE))

    def write_state(state: Draft) -> None:
        state.write(WRITTEN_FILE, json.dumps(written).encode())

    def is_running(number: int) -> bool:
        return not (written[number] and written[number][-1] in ends)

    model = streamed_model(checkpoint, settings.dtype, execution)
    read_before = checkpoint.bytes_read
    title = f"generate calibration: {len(prompts)} responses, streamed"
    with (
        boundaries(draft, execution, write_state) as reached,
        showing(title, total, first, draft.resumed, unit="token") as show,
    ):
        for step in range(first, total):
            group = groups[step // settings.max_tokens]
            if not (running := list(filter(is_running, group))):
                continue
            sequences = {number: [*prompts[number], *written[number]] for number in running}
            parts = _parts(model, sequences, settings.batch, execution)
            for index, weights in enumerate(checkpoint.layers(device=execution.torch_device)):
                advance(model, index, weights, [part.states for part in parts])
                reached(step)  # so that a request to stop does not wait for the end of the pass
            draws = uniform_draws(len(prompts), int(digest([settings.seed, step])[:15], 16))
            for part in parts:
                tokens = next_tokens(part.last_logits(model), draws[list(part.numbers)], settings.temperature)
                for number, token in zip(part.numbers, tokens.tolist(), strict=True):
                    written[number].append(token)
            del part, parts  # before those of the next token are made
            show(step + 1)
            reached(step + 1)
        show(total)
    draft.facts["weights read, bytes"] = checkpoint.bytes_read - read_before
    return [before_end(response, ends) for response in written]


@dataclass(frozen=True)
class _Part:
    """Sequences that share a forward pass through a layer.

    Attributes:
        numbers: numbers of their prompts.
        lengths: numbers of their tokens.
        states: shape ``(sequences, seqlen, layout.size)``, padded on the right.
    """

    numbers: tuple[int, ...]
    lengths: Tensor
    states: Tensor

    def last_logits(self, model: StreamedModel) -> Tensor:
        """Return the logits after the last token of every sequence, shape ``(sequences, vocab_size)``."""
        last = self.states[torch.arange(len(self.lengths)), self.lengths - 1]
        return model.logits(last[:, None])[:, 0]


def _parts(
    model: StreamedModel, sequences: Mapping[int, Sequence[int]], batch: int, execution: Execution
) -> list[_Part]:
    """Embed sequences, those of similar length together. Attention is causal, so the padding changes no other token."""
    room = execution.hidden_states_room()
    positions = positions_of(model.model.config)
    parts = []
    ordered = sorted(sequences, key=lambda number: (len(sequences[number]), number))
    for start in range(0, len(ordered), batch):
        numbers = tuple(ordered[start : start + batch])
        seqlen = padded_length(len(sequences[numbers[-1]]), positions)
        input_ids = torch.full((len(numbers), seqlen), PADDING)
        for row, number in zip(input_ids, numbers, strict=True):
            row[: len(sequences[number])] = torch.tensor(sequences[number])
        states = room.empty((*input_ids.shape, model.layout.size), model.dtype).copy_(model.embed(input_ids))
        parts.append(_Part(numbers, torch.tensor([len(sequences[number]) for number in numbers]), states))
    model.release_embedding()
    model.forget_other_shapes({tuple(part.states.shape[:2]) for part in parts})
    return parts


def uniform_draws(count: int, seed: int) -> Tensor:
    """Return ``count`` uniform draws from [0, 1), float64. The draw of a prompt does not depend on which others have ended."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def next_tokens(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Return a token for every row of logits, from the softmax over the whole vocabulary.

    Args:
        logits: shape ``(rows, vocab_size)``.
        draws: uniform draws from [0, 1), float64, one for each row.
        temperature: of the softmax; 0 takes the most likely token.

    Returns:
        Token ids, shape ``(rows,)``: the first token whose cumulative probability is above the draw.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    # A NaN or an infinity is also the largest logit of its row; -inf hides a token.
    highest, most_likely = logits.max(-1)
    if not highest.isfinite().all():
        raise ValueError(
            f"the model's logits are not finite in {str(logits.dtype).removeprefix('torch.')}. Use another dtype (--dtype), or "
            "check the weights."
        )
    if temperature == 0:
        return most_likely
    found = []
    for some, draw in zip(logits.split(ROWS_AT_ONCE), draws.split(ROWS_AT_ONCE), strict=True):
        below = (some.double() - some.double().amax(-1, keepdim=True)).cpu()
        cumulative = (below / temperature).softmax(-1).cumsum(-1)
        # Scaled by the last sum, which rounding moves from 1, so that no draw is beyond the last token.
        found.append(torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True)[:, 0])
    return torch.cat(found).clamp(max=logits.shape[-1] - 1)
