"""Windows of token ids: consecutive windows for scoring, random windows for calibration.

Scoring follows the perplexity convention of GPTQ (arXiv:2210.17323), SparseGPT and Wanda: the text is one stream of
tokens, cut into windows of ``seqlen`` tokens that do not overlap. The remainder at the end is dropped.

``layerwise.tasks.texts.corpora`` divides a text among calibration, selection and test; ``layerwise.flows.pipeline.text_windows`` decides the
number of windows of each; ``layerwise.tasks.sample_tokens`` stores them.
"""

import math

import torch
from torch import Tensor


def part_bounds(tokens: int, part: tuple[float, float]) -> tuple[int, int]:
    """Return the start and end (exclusive) positions of a part of a token stream.

    Two parts that meet at a fraction meet at the same position: a token is neither in both nor in neither.

    Args:
        tokens: length of the stream.
        part: start and end of the part, as fractions of the stream, ``0 <= start < end <= 1``.
    """
    start, end = part
    return math.floor(start * tokens), math.floor(end * tokens)


def consecutive_windows(token_ids: Tensor, windows: int | None, seqlen: int) -> Tensor:
    """Return the first ``windows`` windows of a token stream; if ``windows`` is None, all windows that fit.

    Args:
        token_ids: token stream, shape ``(tokens,)``.
        windows: number of windows, at least 1.
        seqlen: number of tokens per window.

    Returns:
        Token ids, shape ``(windows, seqlen)``, in the order of the stream.

    Raises:
        ValueError: the stream is too short; the message gives the number of tokens needed.
    """
    require_tokens(len(token_ids), windows, seqlen)
    count = len(token_ids) // seqlen if windows is None else windows
    return token_ids[: count * seqlen].reshape(count, seqlen).clone()


def random_windows(token_ids: Tensor, windows: int, seqlen: int, seed: int) -> Tensor:
    """Return ``windows`` windows at random positions of a token stream, without overlap.

    The stream is cut into consecutive windows, starting at a random offset below ``seqlen``, and windows are drawn
    from these without replacement. The offset always leaves enough windows, so ``windows * seqlen`` tokens suffice.

    Args:
        token_ids: token stream, shape ``(tokens,)``.
        windows: number of windows, at least 1.
        seqlen: number of tokens per window.
        seed: seed of the random numbers; equal seeds give equal windows.

    Returns:
        Token ids, shape ``(windows, seqlen)``, in random order.

    Raises:
        ValueError: the stream is too short; the message gives the number of tokens needed.
    """
    require_tokens(len(token_ids), windows, seqlen)
    generator = torch.Generator("cpu").manual_seed(seed)
    largest_offset = min(seqlen - 1, len(token_ids) - windows * seqlen)
    offset = int(torch.randint(largest_offset + 1, (), generator=generator))
    on_grid = (len(token_ids) - offset) // seqlen
    chosen = torch.randperm(on_grid, generator=generator)[:windows]
    return token_ids[offset : offset + on_grid * seqlen].reshape(on_grid, seqlen)[chosen]


def require_tokens(
    tokens: int, windows: int | None, seqlen: int, source: str = "the text", least: int = 1
) -> None:
    """Raise if a stream is too short for ``windows`` windows (for ``least`` windows if ``windows`` is None).

    Args:
        tokens: length of the stream.
        windows: number of windows to cut from it.
        seqlen: number of tokens per window.
        source: name of the stream in the message.
        least: smallest useful number of windows.

    Raises:
        ValueError: the stream is too short. The message gives the source, its tokens, the tokens needed and the remedy.
    """
    count = least if windows is None else windows
    if tokens < count * seqlen:
        fitting = tokens // seqlen
        fewer = fitting >= least
        raise ValueError(
            f"{source} has {tokens} tokens, but {count} x {seqlen} = {count * seqlen} are needed. Use a longer text"
            f"{', shorter windows or fewer of them' if fewer else ' or shorter windows'}: {fitting} of {seqlen} "
            "tokens fit."
        )
