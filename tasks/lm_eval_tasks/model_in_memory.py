"""lm-eval's transformers model for a whole model in memory, which also says what was cut off."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerwise.tasks.lm_eval_tasks.questions import Questions, Response, instances_of

# Sequences per forward pass. This is not a setting, because the last bits of every result depend on the batch's shape.
BATCH_SIZE = 8


class WholeLM(HFLM):
    """HFLM whose answers say whether the prompt was truncated, and whether the answer was cut at its maximum length.

    Args:
        model: the model with all its weights.
        tokenizer: tokenizer of the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        # In the model's 16 bits, log-probabilities would be so coarse that choices tie and the first one wins.
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, softmax_dtype="float32"
        )
        self._written: list[list[int]] = []  # tokens that the model wrote in the last batch, by row

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> list[Any]:
        """Return log-probability, whether greedy decoding yields the continuation, and whether it was truncated."""
        answers = super()._loglikelihood_tokens(requests, *arguments, **options)
        return [
            (*answer, len(context) + len(continuation) > self.max_length + 1)
            for answer, (_, context, continuation) in zip(answers, requests, strict=True)
        ]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        rows: Tensor = super()._model_generate(context, max_length, stop, **options)
        self._written = rows[:, context.shape[1] :].tolist()
        return rows

    def batches(self, questions: Questions) -> list[list[tuple[int, Instance]]]:
        """Return the requests for generated answers in batches, the longest prompts first, as lm-eval sorts them.

        Returns:
            Pairs of the number of the request and the request.
        """
        requests = list(enumerate(instances_of([questions])))
        requests.sort(key=lambda pair: (-len(self.tok_encode(pair[1].args[0])), pair[1].args[0]))
        return [requests[start : start + BATCH_SIZE] for start in range(0, len(requests), BATCH_SIZE)]

    def respond(self, requests: Sequence[Instance], answer_tokens: int) -> list[Response]:
        """Let the model write the answers to one of ``batches``, by lm-eval's own generation.

        Args:
            answer_tokens: maximum length of an answer.
        """
        texts = self.generate_until(list(requests), disable_tqdm=True)
        responses = []
        for request, text, row in zip(requests, texts, self._written, strict=True):
            assert str(self.tok_decode(row)).startswith(text), (
                "a batch is generated in the order of `batches`"
            )
            prompt, options = request.args
            responses.append(
                Response(
                    text,
                    len(self.tokenizer.encode(text, add_special_tokens=False)),
                    len(row) >= answer_tokens and not self._ended(row, options.get("until")),
                    len(self.tok_encode(prompt)) > self.max_length - answer_tokens,
                )
            )
        return responses

    def require_room(self, questions: Questions) -> None:
        """Refuse answers that leave no position for a prompt.

        Raises:
            ValueError: the maximum length of an answer is not below the number of positions of the model.
        """
        if questions.answer_tokens >= self.max_length:
            raise ValueError(
                f"the task {questions.task} has answers of up to {questions.answer_tokens} tokens, but the model has "
                f"{self.max_length} positions for a prompt and its answer. Choose another task, or copy its file and "
                "lower max_gen_toks."
            )

    def _ended(self, row: Sequence[int], until: str | Sequence[str] | None) -> bool:
        """Return whether the tokens of an answer contain a stop sequence or the last token of a text."""
        ends = self.model.generation_config.eos_token_id
        if set(ends if isinstance(ends, list) else [ends]) & set(row):
            return True
        stops = [until] if isinstance(until, str) else list(until or [])
        stops.append(self.tok_decode(self.eot_token_id, skip_special_tokens=False))
        written = self.tok_decode(row, skip_special_tokens=False)
        return any(stop in written for stop in stops if stop)
