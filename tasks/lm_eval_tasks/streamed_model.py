"""lm-eval's model of transformers, with decoder layers that come and go."""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from layerwise.models.streaming import StreamedModel
from layerwise.scoring.continuations import Continuation, Score

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # its text, context, continuation


class StreamedLM(HFLM):
    """Everything but the forward pass is inherited, so that text becomes tokens exactly as it does in memory.

    Args:
        model: whose layers are streamed.
        tokenizer: that came with it.
        score: takes all continuations through the model at once.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokenizer: PreTrainedTokenizerBase,
        score: Callable[[Sequence[Continuation]], Sequence[Score]],
    ) -> None:
        super().__init__(pretrained=model.model, tokenizer=tokenizer)
        self._score = score

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], *_: Any, **__: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of every continuation, and whether greedy decoding gives it."""
        # What is too long loses tokens on the left, as in memory; the last token is no input.
        kept = self.max_length + 1
        continuations = [
            Continuation((*context, *continuation)[-kept:], len(continuation))
            for _, context, continuation in requests
        ]
        return [(score.log_probability, score.greedy) for score in self._score(continuations)]
