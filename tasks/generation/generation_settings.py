"""Settings of generated text, and where a response ends."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class GenerationSettings:
    """Settings that decide what the model writes.

    Attributes:
        dtype: dtype that the model computes in.
        max_tokens: maximum length of a response, in tokens.
        temperature: of the softmax that tokens are drawn from; 0 takes the most likely token.
        batch: prompts per forward pass. It is part of the key, because the last bits of every logit depend on it.
        seed: seed of the draws.
        way: memory for the whole model in memory, streamed for one layer at a time. Their draws differ.
    """

    dtype: str
    max_tokens: int
    temperature: float
    batch: int
    seed: int
    way: Literal["memory", "streamed"] = "memory"

    @property
    def parameters(self) -> dict[str, object]:
        """The settings as part of the key. Texts that were written before there were two ways keep their keys."""
        every = asdict(self)
        return (
            every if self.way == "streamed" else {name: each for name, each in every.items() if name != "way"}
        )


def before_end(token_ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens before the first one that ends a response."""
    end = next((position for position, token in enumerate(token_ids) if token in ends), len(token_ids))
    return list(token_ids[:end])
