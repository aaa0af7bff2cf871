"""lm-eval's transformers model for a model that is streamed, one decoder layer at a time."""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from layerwise.models.streaming import StreamedModel
from layerwise.scoring.continuations import Continuation, Score

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]  # text, context, continuation


class StreamedLM(HFLM):
    """HFLM with another forward pass. The rest is inherited, so text is tokenised exactly as for a model in memory.

    Args:
        model: model whose layers are streamed.
        tokenizer: tokenizer of the model.
        score: function that scores all continuations together.
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
    ) -> list[tuple[float, bool, bool]]:
        """Return the log-probability of every continuation, whether greedy decoding yields it, and if it was truncated."""
        # Long sequences are cut on the left, as HFLM does; the last token is not an input.
        kept = self.max_length + 1
        continuations = [
            Continuation((*context, *continuation)[-kept:], len(continuation))
            for _, context, continuation in requests
        ]
        return [
            (score.log_probability, score.greedy, len(context) + len(continuation) > kept)
            for score, (_, context, continuation) in zip(self._score(continuations), requests, strict=True)
        ]
