"""Settings of a speed measurement. Does not import torch, because the command line needs the defaults."""

from dataclasses import dataclass

# Larger values would make a measurement take hours.
MOST = {"prompt_tokens": 131_072, "new_tokens": 16_384, "rounds": 1000}


@dataclass(frozen=True)
class SpeedSettings:
    """Work of a speed measurement: every engine reads a random prompt and generates tokens, in turns.

    At least two new tokens are needed, because decoding is timed from the second token.

    Attributes:
        prompt_tokens: number of tokens in the prompt.
        new_tokens: number of tokens to generate.
        rounds: number of times to run every engine.

    Raises:
        ValueError: a number is too small or too large.
    """

    prompt_tokens: int = 64
    new_tokens: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.rounds) < 1 or self.new_tokens < 2:
            raise ValueError(
                f"speed cannot be measured with {self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens and "
                f"{self.rounds} rounds. Use at least 1 prompt token, 2 new tokens and 1 round."
            )
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {most} or less.")
