"""Windows of token ids: consecutive ones for scoring, seeded random ones for calibration.

Scoring follows the perplexity convention of GPTQ (arXiv:2210.17323), SparseGPT and Wanda: the text is one
stream of tokens, cut into windows of ``seqlen`` that do not overlap; what is left at the end is dropped.
"""

import math

import torch
from torch import Tensor


def part_bounds(tokens: int, part: tuple[float, float]) -> tuple[int, int]:
    """First position of a part of a stream, and the position after its last one.

    Parts that meet at the same fraction meet at the same position: no token is in both, and none is lost.

    Args:
        tokens: length of the stream.
        part: start and end of the part, as fractions of the stream, ``0 <= start < end <= 1``.
    """
    start, end = part
    return math.floor(start * tokens), math.floor(end * tokens)


def consecutive_windows(token_ids: Tensor, windows: int | None, seqlen: int) -> Tensor:
    """The first ``windows`` windows of a stream, side by side; all that fit if ``windows`` is None.

    Args:
        token_ids: the stream, shape ``(tokens,)``.
        windows: how many windows, at least 1.
        seqlen: tokens in each window.

    Returns:
        Token ids, shape ``(windows, seqlen)``, in the order of the stream.

    Raises:
        ValueError: the stream is too short; says how many tokens are needed.
    """
    require_tokens(len(token_ids), windows, seqlen)
    count = len(token_ids) // seqlen if windows is None else windows
    return token_ids[: count * seqlen].reshape(count, seqlen).clone()


def random_windows(token_ids: Tensor, windows: int, seqlen: int, seed: int) -> Tensor:
    """``windows`` different windows from random places of a stream. No two of them overlap.

    The grid of windows starts at a random offset below ``seqlen`` and the windows are drawn from this grid
    without replacement. The offset is never so large that too few windows are left, so ``windows * seqlen``
    tokens are enough.

    Args:
        token_ids: the stream, shape ``(tokens,)``.
        windows: how many windows, at least 1.
        seqlen: tokens in each window.
        seed: equal seeds give equal windows.

    Returns:
        Token ids, shape ``(windows, seqlen)``, in random order.

    Raises:
        ValueError: the stream is too short; says how many tokens are needed.
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
    """Refuse a stream that is too short for ``windows`` windows (for ``least`` windows if ``windows`` is None).

    Args:
        tokens: length of the stream.
        windows: how many windows are to be cut from it.
        seqlen: tokens in each window.
        source: what the stream is, for the message.
        least: smallest number of windows that is of use.

    Raises:
        ValueError: names the source, the tokens there, the tokens needed and what to do.
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
