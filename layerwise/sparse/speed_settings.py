"""What a measurement of speed runs; without torch, as the command line asks for the defaults."""

from dataclasses import dataclass

# A measurement with more would not end within hours.
MOST = {"prompt_tokens": 131_072, "new_tokens": 16_384, "rounds": 1000}


@dataclass(frozen=True)
class SpeedSettings:
    """What is run: every way reads a random prompt and writes after it, in turns.

    Raises:
        ValueError: a number below 1; fewer than two new tokens, of which only those after the first are decoded alone;
            or a number with which it would not end.
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
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {most} or less.")
